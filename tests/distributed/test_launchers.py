"""Who a process is, from environments as launchers make them."""

import contextlib

import pytest
import torch

from ostro.core.errors import ConfigError
from ostro.distributed import DistributedConfig, join_process_group, rank_info_of
from ostro.distributed.launchers import (
    RankInfo,
    find_rank_info,
    slurm_address,
    slurm_nodes,
    visible_devices,
)

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n1", "MASTER_PORT": "29501", "TORCHELASTIC_USE_AGENT_STORE": "True",
    "TORCHELASTIC_RESTART_COUNT": "2",
}  # fmt: skip
JOB = {
    "SLURM_JOB_ID": "12345", "SLURM_JOB_NODELIST": "node[001-004,007]", "SLURM_NTASKS": "10",
    "SLURM_TASKS_PER_NODE": "2(x5)",
}  # fmt: skip
TASK = JOB | {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURMD_NODENAME": "node003",
    "SLURM_STEP_NODELIST": "node[001-004,007]", "SLURM_STEP_NUM_TASKS": "10",
    "SLURM_STEP_TASKS_PER_NODE": "2(x5)",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MVAPICH = {name.replace("OMPI", "MV2"): value for name, value in OPEN_MPI.items()}
INTEL = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("node[001-004,007]", "node001 node002 node003 node004 node007"),
        ("n[8-10]", "n8 n9 n10"),
        ("n[08-10]", "n08 n09 n10"),
        ("login,gpu[1,3],x[098-101]", "login gpu1 gpu3 x098 x099 x100 x101"),
        ("rack[1-2]n[01-02]", "rack1n01 rack1n02 rack2n01 rack2n02"),
        ("c[2]-ib", "c2-ib"),
        ("10.0.0.[1-2]", "10.0.0.1 10.0.0.2"),
        ("one", "one"),
        ("", ""),
    ],
)
def test_node_lists_are_expanded(text, nodes):
    assert slurm_nodes({"SLURM_NODELIST": text}) == nodes.split()


def test_a_job_gives_the_address():
    assert slurm_address(JOB) == "node001:61497"
    assert slurm_address(JOB | {"SLURM_STEP_NODELIST": "node007"}) == "node007:61497"
    assert slurm_address({}) is None


def test_torchrun():
    assert find_rank_info(TORCHRUN) == RankInfo(
        "torchrun", 3, 4, 1, 2, "n1:29501", has_agent=True, attempt=2
    )


def test_a_task_of_slurm():
    rank_info = find_rank_info(TASK)
    assert (rank_info.launcher, rank_info.rank, rank_info.num_ranks) == ("SLURM", 5, 10)
    assert (rank_info.local_rank, rank_info.num_local, rank_info.address) == (1, 2, "node001:61497")
    assert rank_info.hosts == tuple(node for node in slurm_nodes(JOB) for _ in "ab")
    own = {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "1234"}
    assert find_rank_info(TASK | own).address == "10.0.0.9:1234"


def test_slurm_counts_tasks_on_this_node():
    uneven = TASK | {"SLURM_STEP_NODELIST": "a[1-4]", "SLURM_STEP_TASKS_PER_NODE": "3(x3),1"}
    nodes = [uneven | {"SLURMD_NODENAME": name} for name in ("a1", "a4", "?")]
    assert [find_rank_info(node).num_local for node in nodes] == [3, 1, None]
    assert find_rank_info(uneven).hosts == ("a1",) * 3 + ("a2",) * 3 + ("a3",) * 3 + ("a4",)
    assert find_rank_info(uneven | {"SLURM_DISTRIBUTION": "cyclic"}).hosts == ()


@pytest.mark.parametrize(
    "environ",
    [
        JOB,  # salloc's shell: SLURM says how many tasks there could be, and not which this is
        JOB | {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "ENVIRONMENT": "BATCH"},  # sbatch's
        TASK | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {},
    ],
)
def test_one_process_stays_one(environ):
    assert find_rank_info(environ) == RankInfo()
    assert join_process_group(DistributedConfig(), "cpu", False, environ).num_ranks == 1


def test_batch_step_is_told_from_its_script():
    assert find_rank_info(TASK | {"ENVIRONMENT": "BATCH"}).num_ranks == 10
    old = JOB | {"SLURM_PROCID": "7"}  # without any variable of the step
    assert find_rank_info(old).rank == 7


@pytest.mark.parametrize("environ", [OPEN_MPI, MVAPICH, INTEL])
def test_mpi(environ):
    rank_info = find_rank_info(environ)
    assert (rank_info.launcher, rank_info.rank, rank_info.num_ranks) == ("MPI", 1, 2)
    assert (rank_info.local_rank, rank_info.num_local, rank_info.address) == (
        1,
        2,
        "127.0.0.1:29500",
    )
    assert find_rank_info(environ | {"MASTER_ADDR": "h"}).address == "h:29500"


def test_mpi_over_hosts_needs_an_address():
    over = OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}
    with pytest.raises(ConfigError, match=r"coordinator_address = null.*MASTER_ADDR"):
        rank_info_of(DistributedConfig(), over)


def test_the_first_of_settings_torchrun_slurm_and_mpi_counts():
    everything = INTEL | TASK | TORCHRUN
    assert find_rank_info(everything).launcher == "torchrun"
    assert find_rank_info(INTEL | TASK).launcher == "SLURM"
    # Scripts often export the count and the address, and leave the rank to SLURM.
    found = find_rank_info(TASK | {"WORLD_SIZE": "10", "MASTER_ADDR": "m"})
    assert (found.launcher, found.rank, found.address) == ("SLURM", 5, "m:29500")
    rank_info = rank_info_of(DistributedConfig("10.0.0.1:7", 10, 5), TASK)
    assert (rank_info.rank, rank_info.num_ranks, rank_info.address) == (5, 10, "10.0.0.1:7")
    alone = rank_info_of(DistributedConfig("10.0.0.1:7", 10, 5), {})
    assert (alone.rank, alone.num_ranks, alone.address) == (5, 10, "10.0.0.1:7")


@pytest.mark.parametrize(
    ("config", "environ", "part"),
    [
        ({"num_processes": 3}, TORCHRUN, "num_processes = 3 - the launcher says WORLD_SIZE = 4"),
        ({"process_id": 1, "num_processes": 10}, TASK, "SLURM_PROCID = 5"),
        ({"num_processes": 3}, TASK, "SLURM_STEP_NUM_TASKS = 10"),
        ({"num_processes": 3}, OPEN_MPI, "OMPI_COMM_WORLD_SIZE = 2"),
        ({}, TORCHRUN | {"RANK": "first"}, "RANK = first - must be a whole number"),
    ],
)
def test_disagreement_is_refused(config, environ, part):
    with pytest.raises(ConfigError, match=part):
        rank_info_of(DistributedConfig(**config), environ)


@pytest.mark.parametrize(
    ("visible", "num_local", "local", "share"),
    [
        ("0,1,2,3,4,5,6,7", 2, 1, ["4", "5", "6", "7"]),
        ("4,5,6,7", 4, 2, ["6"]),
        ("GPU-a,GPU-b", 2, 0, ["GPU-a"]),
        ("3", 4, 2, ["3"]),
        ("", 2, 0, None),
    ],
)
def test_visible_devices_are_split_over_the_tasks(visible, num_local, local, share):
    rank_info = RankInfo("SLURM", local, num_local, local, num_local)
    assert visible_devices({"CUDA_VISIBLE_DEVICES": visible}, rank_info) == share
    assert visible_devices({}, rank_info) is None


@pytest.mark.parametrize(
    ("config", "environ", "count", "index"),
    [
        ({}, TORCHRUN, 4, 1),
        ({}, TORCHRUN | {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, 1),
        ({}, TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}, 8, 4),
        ({}, TASK | {"CUDA_VISIBLE_DEVICES": "6,7"}, 2, 1),
        ({}, TASK | {"CUDA_VISIBLE_DEVICES": "7"}, 1, 0),  # bound to the task by SLURM
        ({}, TASK, 4, 1),
        ({"local_device_ids": 3}, TASK, 4, 3),
        ({"local_device_ids": [2]}, {}, 4, 2),
        ({}, {}, 1, 0),
        ({}, TORCHRUN, 1, "process 3 would use GPU 1; here are 1"),
        ({"local_device_ids": 5}, TASK, 4, "process 5 would use GPU 5; here are 4"),
        ({}, TASK | {"CUDA_VISIBLE_DEVICES": "0,1,2"}, 3, "2 processes .* cannot share 3 GPUs"),
    ],
)
def test_each_process_gets_a_gpu(monkeypatch, config, environ, count, index):
    picked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", picked.append)
    monkeypatch.setattr("ostro.distributed.rendezvous._connect", _never)
    if isinstance(index, str):
        with pytest.raises(ConfigError, match=index):
            join_process_group(DistributedConfig(**config), "auto", True, environ)
        return
    with pytest.raises(_Reached) if environ else contextlib.nullcontext():
        join_process_group(DistributedConfig(**config), "auto", True, environ)
    assert picked == [torch.device("cuda", index)]


class _Reached(Exception):
    pass


def _never(*_):
    raise _Reached  # there is nobody to meet


@pytest.mark.parametrize(
    ("config", "setting", "rule"),
    [
        ({"local_device_ids": [0, 1]}, "local_device_ids", "a process drives one device"),
        ({"coordinator_address": "host:"}, "coordinator_address", "must be host:port"),
        ({"timeout": DistributedConfig().timeout * 0}, "timeout", "must be longer than nothing"),
    ],
)
def test_settings_that_cannot_be(config, setting, rule):
    problems = list(DistributedConfig(**config).problems())
    assert [(problem.setting, problem.rule) for problem in problems] == [(setting, rule)]
