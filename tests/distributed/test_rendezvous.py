"""Processes meet, miss one another, and die: as launchers would start them."""

import os
import re
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from tiny_run import PLAIN, TESTS, free_port, torchrun_words

from ostro.core.errors import OstroError
from ostro.distributed import DistributedConfig, join_process_group
from ostro.distributed.launchers import RankInfo
from ostro.distributed.rendezvous import Rendezvous

pytestmark = pytest.mark.dist

PROGRAM = TESTS / "ranks_program.py"


def slurm(rank: int, num_ranks: int) -> dict[str, str]:
    """What srun tells the tasks of one node."""
    return {
        "SLURM_JOB_ID": "1", "SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": str(num_ranks),
        "SLURM_STEP_NODELIST": "localhost", "SLURMD_NODENAME": "localhost",
        "SLURM_STEP_TASKS_PER_NODE": str(num_ranks), "SLURM_LOCALID": str(rank),
        "MASTER_ADDR": "localhost",
    }  # fmt: skip


def open_mpi(rank: int, num_ranks: int) -> dict[str, str]:
    """What mpirun tells the processes of one host."""
    name = "OMPI_COMM_WORLD"
    count = {f"{name}_SIZE": str(num_ranks), f"{name}_LOCAL_SIZE": str(num_ranks)}
    return {f"{name}_RANK": str(rank), f"{name}_LOCAL_RANK": str(rank)} | count


def start(mode: str, environ: dict[str, str], out: Path, words=()) -> subprocess.Popen:
    """A process of the program; what it prints is added to `out`, in order."""
    with out.open("a") as file:
        return subprocess.Popen(
            [*words, sys.executable, PROGRAM, mode],
            cwd=out.parent, env=PLAIN | environ, stdout=file, stderr=file,
        )  # fmt: skip


def run_all(mode: str, make_environ, num_ranks: int, out: Path) -> tuple[list[int], str]:
    """Exit codes of all ranks, started as separate processes, and what they printed together."""
    port = {"MASTER_PORT": free_port()}
    ranks = [start(mode, make_environ(r, num_ranks) | port, out) for r in range(num_ranks)]
    return [rank.wait(90) for rank in ranks], out.read_text()


@pytest.mark.parametrize("launcher", [slurm, open_mpi])
def test_two_processes_meet(tmp_path, launcher):
    codes, text = run_all("sum", launcher, 2, tmp_path / "out")
    assert codes == [0, 0], text
    assert sorted(text.splitlines()) == ["rank 0 of 2 on 1: 3", "rank 1 of 2 on 1: 3"]


@pytest.fixture
def two_hosts():
    """Command prefixes that run in two networks, joined by a cable, which end with two sleeps."""
    sleeps = []
    try:
        for _ in range(2):
            sleeps.append(subprocess.Popen(["unshare", "--net", "sleep", "180"]))
        ids = [str(sleep.pid) for sleep in sleeps]
        inside = [["nsenter", "--target", number, "--net"] for number in ids]
        networks = [os.readlink("/proc/self/ns/net")] * 2
        while os.readlink("/proc/self/ns/net") in networks:
            if any(sleep.poll() is not None for sleep in sleeps):
                pytest.skip("this user may not make networks")
            networks = [os.readlink(f"/proc/{number}/ns/net") for number in ids]
        cable = f"ip link add eth0 netns {ids[0]} type veth peer name eth0 netns {ids[1]}"
        commands = [cable.split()]
        for host, prefix in enumerate(inside, 1):
            commands += [[*prefix, *f"ip addr add 10.9.0.{host}/24 dev eth0".split()]]
            commands += [[*prefix, *f"ip link set {name} up".split()] for name in ("lo", "eth0")]
        for command in commands:
            subprocess.run(command, check=True, capture_output=True)
        yield inside
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no networks of our own here: {error}")
    finally:
        for sleep in sleeps:
            sleep.kill()
            sleep.wait()


def test_two_hosts_meet(tmp_path, two_hosts):
    """Each in a network of its own, with one task of SLURM; the node list leads them together."""
    ranks = []
    for rank, inside in enumerate(two_hosts):
        node = f"10.9.0.{rank + 1}"
        environ = {
            "SLURM_JOB_ID": "12345", "SLURM_PROCID": str(rank), "SLURM_LOCALID": "0",
            "SLURM_NTASKS": "2", "SLURM_JOB_NODELIST": "10.9.0.[1-2]", "SLURMD_NODENAME": node,
            "SLURM_TASKS_PER_NODE": "1(x2)", "GLOO_SOCKET_IFNAME": "eth0",
        }  # fmt: skip
        ranks.append(start("sum", environ, tmp_path / "out", inside))
    assert [rank.wait(90) for rank in ranks] == [0, 0], (tmp_path / "out").read_text()
    lines = sorted((tmp_path / "out").read_text().splitlines())
    assert lines == ["rank 0 of 2 on 2: 3", "rank 1 of 2 on 2: 3"]


@pytest.fixture
def nobody_there(monkeypatch):
    """This process tries to meet others; the store is forgotten afterwards."""
    monkeypatch.setattr(Rendezvous, "current", None)

    def try_to_join(environ: dict[str, str]) -> str:
        with pytest.raises(OstroError) as caught:
            join_process_group(
                DistributedConfig(timeout=timedelta(seconds=1)), "cpu", False, environ
            )
        return str(caught.value)

    return try_to_join


@pytest.mark.parametrize(
    ("rank", "said"),
    [
        (0, "ranks 1 (on localhost), 2 (on far) of 3 did not come to localhost:"),
        (2, "rank 0 (on localhost) of 3 did not come to localhost:"),
    ],
)
def test_absent_ranks_are_named_within_the_timeout(nobody_there, capfd, rank, said):
    hosts = {"SLURM_STEP_NODELIST": "localhost,far", "SLURM_STEP_TASKS_PER_NODE": "2,1"}
    begin = time.monotonic()
    text = nobody_there(slurm(rank, 3) | hosts | {"MASTER_PORT": free_port()})
    assert time.monotonic() - begin < 20
    assert text.startswith(said)
    assert "within trainer.distributed.timeout = 1 s - see whether" in text
    assert capfd.readouterr().err == "", "torch prints a page of C++ frames for less"


def test_a_port_that_is_taken(nobody_there, capfd):
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        text = nobody_there(slurm(0, 2) | {"MASTER_PORT": port})
    assert f"coordinator_address = localhost:{port} (MASTER_ADDR) - rank 0 cannot listen" in text
    assert capfd.readouterr().err == ""


def test_a_name_that_does_not_resolve(nobody_there):
    text = nobody_there(slurm(0, 2) | {"MASTER_ADDR": "no-such-host.invalid", "MASTER_PORT": "9"})
    assert "coordinator_address = no-such-host.invalid:9 (MASTER_ADDR) - the host name" in text
    assert "free port" not in text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.2"])
def test_the_store_listens_where_the_ranks_meet(host):
    rendezvous = Rendezvous(
        RankInfo(None, 0, 2, address=f"{host}:{free_port()}"), timedelta(seconds=5)
    )
    port = int(rendezvous.rank_info.address.rpartition(":")[2])
    listening = re.findall(rf"^ *\d+: (\w+):{port:04X} 0+:0000 0A", tcp_sockets(), re.MULTILINE)
    assert listening and set(map(socket_address, listening)) <= {"127.0.0.1", "127.0.0.2", "::1"}


def tcp_sockets() -> str:
    paths = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
    return "".join(path.read_text() for path in paths if path.exists())


def socket_address(digits: str) -> str:
    """An address of /proc/net/tcp, or tcp6: words of the host's byte order."""
    words = [bytes.fromhex(digits[start : start + 8])[::-1] for start in range(0, len(digits), 8)]
    family = socket.AF_INET if len(words) == 1 else socket.AF_INET6
    return socket.inet_ntop(family, b"".join(words))


def test_ranks_that_were_told_other_numbers(tmp_path):
    """Neither waits for a rank that there is not."""
    port = {"MASTER_PORT": free_port()}
    ranks = [start("sum", slurm(r, 2 + r) | port, tmp_path / "out") for r in range(2)]
    codes = [rank.wait(90) for rank in ranks]
    text = (tmp_path / "out").read_text()
    assert 2 in codes and 0 not in codes, text
    assert re.search(r"SLURM_STEP_NUM_TASKS = \d - rank \d was told that there are \d", text)


@pytest.mark.parametrize("mode", ["rank_1_raises", "rank_1_is_killed"])
def test_a_rank_that_dies_ends_all(tmp_path, mode):
    """Without a launcher that would end the others: they are inside a sum, and notice."""
    codes, text = run_all(mode, slurm, 3, tmp_path / "out")
    assert time.time() - float((tmp_path / "died").read_text()) < 30
    assert codes[0] == codes[2] == 1
    lines = text.splitlines()
    others = [line for line in lines if "ostro: error: " in line]
    assert 1 <= len(others) <= 2, text
    if mode == "rank_1_raises":
        assert codes[1] == 1
        assert lines[0] == "[rank1]: Traceback (most recent call last):"
        assert f"[rank1]: ValueError: broken\n{others[0]}" in text
        assert re.search(r"has failed: rank 1 \(.+\): ValueError: broken$", others[0])
    else:
        assert codes[1] == -9
        assert lines == others
        assert "a process of the run is gone without a word" in lines[0]


def test_what_all_ranks_refuse_is_said_once(tmp_path):
    """Under a launcher that keeps a store, before the meeting; and with no such help, after it."""
    words = torchrun_words(3, PROGRAM, "all_refuse")
    done = subprocess.run(words, env=PLAIN, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode
    assert done.stderr.startswith("ostro: error: trainer.sed = 3 - is not a setting\n")
    assert done.stderr.count("trainer.sed") == 1
    codes, text = run_all("all_refuse_later", slurm, 2, tmp_path / "out")
    assert codes == [2, 2]
    assert text == "ostro: error: trainer.train_batch_size = 4 - must be divisible by 3\n"


def test_what_one_rank_refuses_is_said_and_ends_the_wait_of_the_others(tmp_path):
    codes, text = run_all("rank_1_refuses", slurm, 2, tmp_path / "out")
    assert codes == [1, 2]
    first, second = text.splitlines()
    assert first == "[rank1]: ostro: error: trainer.sed = 3 - is not a setting"
    assert re.search(r"has failed: rank 1 \(.+\): trainer.sed = 3 - is not a setting$", second)


LEAVING = """
import sys, time
from datetime import timedelta
from ostro.distributed.launchers import RankInfo
from ostro.distributed.rendezvous import Rendezvous

rank, address = int(sys.argv[1]), sys.argv[2]
rendezvous = Rendezvous(RankInfo(None, rank, 2, address=address), timedelta(seconds=60))
rendezvous.gather(timedelta(seconds=60))
if rank == int(sys.argv[3]):
    time.sleep(2)
start = time.monotonic()
rendezvous.wait_for_first(lambda: False)
print(round(time.monotonic() - start))
"""


@pytest.mark.parametrize(("late", "seconds"), [(0, ["0", "2"]), (1, ["0", "0"])])
def test_none_leaves_before_the_first_and_none_waits_for_one_that_has_left(late, seconds):
    """Also where the first rank keeps the store, which is gone with it."""
    words = [sys.executable, "-c", LEAVING]
    address = f"127.0.0.1:{free_port()}"
    ranks = [
        subprocess.Popen([*words, str(rank), address, str(late)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        assert [rank.communicate(timeout=40)[0].strip() for rank in ranks] == seconds
    finally:
        for rank in ranks:
            rank.kill()
