#!/bin/bash
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --partition=gpu
#SBATCH --time=24:00:00
#SBATCH --job-name=ostro
set -euo pipefail
export RUN_ID="${RUN_ID:-slurm-$SLURM_JOB_ID}"
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export MASTER_ADDR="$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)"
export MASTER_PORT=$((61440 + SLURM_JOB_ID % 4096))
srun --kill-on-bad-exit=1 bash -c 'torchrun --nnodes=4 --nproc_per_node=8 --max_restarts=3 --node_rank=$SLURM_NODEID --master_addr=$MASTER_ADDR --master_port=$MASTER_PORT --no_python ostro train --config_path config/gpt2_small.yaml'
