"""`ostro launch slurm`: the script it would submit, and how it is submitted."""

import os
import re
import shlex
import subprocess

import pytest
from tiny_run import write_config

from ostro.cli.main import run_command


@pytest.fixture
def launch(tmp_path, capsys):
    """Run `ostro launch slurm` on a tiny configuration; returns exit code, output, errors."""
    config = write_config(tmp_path, trainer={"train_batch_size": 32})

    def run(*words):
        code = run_command(["launch", "slurm", "--config_path", str(config), *words])
        return code, *capsys.readouterr()

    return run


def run_script(script: str, tmp_path, **environ: str) -> list[str]:
    """What the tasks of a script would run: with an srun that only notes its words."""
    commands = {
        "srun": 'printf "%s\\n" "$RUN_ID" "$@" > srun.txt',
        "scontrol": "echo node003; echo node004",
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    job = {
        "SLURM_CPUS_PER_TASK": "8",
        "SLURM_JOB_ID": "4097",
        "SLURM_JOB_NODELIST": "node[003-004]",
        "PATH": path,
    }
    subprocess.run(["bash", "-c", script], env=job | environ, cwd=tmp_path, check=True, timeout=30)
    return (tmp_path / "srun.txt").read_text().splitlines()


def test_one_task_for_each_gpu(launch, tmp_path):
    code, script, _ = launch(
        "--nodes", "2", "--gpus_per_node", "8", "--partition", "gpu", "--time", "24:00:00",
        "--account", "me", "--sbatch", "exclude=node007", "--dry_run",
        "--optimizer.learning_rate", "2e-3",
    )  # fmt: skip
    assert code == 0
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    asked = set(re.findall(r"^#SBATCH --(.*)$", script, re.M))
    assert asked >= {
        "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "partition=gpu", "time=24:00:00",
        "account=me", "exclude=node007", "job-name=ostro", "requeue",
    }  # fmt: skip
    run_id, *words = run_script(script, tmp_path)
    assert run_id == "slurm-4097"
    config = str(tmp_path / "config.yaml")
    assert words == [
        "--kill-on-bad-exit=1", "ostro", "train", "--config_path", config,
        "--optimizer.learning_rate", "2e-3",
    ]  # fmt: skip
    assert run_script(script, tmp_path, RUN_ID="mine")[0] == "mine"


def test_restarts_come_from_torchrun(launch, tmp_path):
    words = ("--nodes", "2", "--processes_per_node", "4", "--max_restarts", "3", "--dry_run")
    words += ("--cpus_per_process", "2")
    code, script, _ = launch(*words, "--trainer.id", "it's")
    assert code == 2, "the configuration is checked before anything is submitted"
    code, script, _ = launch(*words, "--data.text_key", "it's")
    assert code == 0
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "ntasks-per-node=1\n" in script and "cpus-per-task=8\n" in script
    assert "gpus" not in script
    _, kill, bash, option, command = run_script(script, tmp_path)
    assert (kill, bash, option) == ("--kill-on-bad-exit=1", "bash", "-c")
    words = shlex.split(command)
    assert words[:4] == ["torchrun", "--nnodes=2", "--nproc_per_node=4", "--max_restarts=3"]
    assert words[-2:] == ["--data.text_key", "it's"]
    shown = command.replace("torchrun", "echo", 1)
    environ = {"SLURM_NODEID": "1", "MASTER_ADDR": "node003", "MASTER_PORT": "61441"}
    done = subprocess.run(["bash", "-c", shown], env=environ, capture_output=True, text=True)
    assert "--node_rank=1 --master_addr=node003 --master_port=61441" in done.stdout


def test_submitted_with_sbatch(launch, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    words = ("--nodes", "2", "--gpus_per_node", "4")
    code, _, errors = launch(*words)
    assert code == 2
    assert errors.startswith("ostro: error: ostro launch slurm - there is no sbatch")
    assert errors.count("\n") == 1
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\n/bin/cat > {tmp_path}/job\necho Submitted batch job 7\n")
    sbatch.chmod(0o755)
    assert launch(*words)[:2] == (0, "Submitted batch job 7\n")
    _, script, _ = launch(*words, "--dry_run")
    assert (tmp_path / "job").read_text() == script.removesuffix("\n")
    sbatch.write_text("#!/bin/sh\necho invalid partition >&2\nexit 1\n")
    assert launch(*words)[::2] == (
        2, "ostro: error: ostro launch slurm - sbatch refused the job: invalid partition\n"
    )  # fmt: skip


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--nodes", "2"], "give one of the two: --gpus_per_node 8"),
        (["--nodes", "0", "--gpus_per_node", "1"], "--nodes = 0 - must be at least 1"),
        (["--gpus_per_node", "3"], "must be divisible by per_device_parallelism"),
        (["--gpus_per_node", "3", "--trainer.sed", "1"], "did you mean seed?"),
    ],
)
def test_mistakes_are_named_before_a_job_waits(launch, words, part):
    code, out, errors = launch(*words, "--dry_run")
    assert (code, out) == (2, "")
    assert part in errors
