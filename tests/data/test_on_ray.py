"""Tokenising on a Ray cluster of two nodes: the local bytes, whatever dies."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from ostro.cli.main import run_command
from ostro.core.errors import ConfigError, DataError
from ostro.data.cache.build import CacheRequest, open_cache
from ostro.data.cache.on_ray import _connected
from ostro.data.cache.store import CacheDir
from ostro.data.sources.source import UrlsSource
from ostro.data.tokenizer import ByteTokenizer, CharTokenizer
from ostro.data.tokenizer_config import BytesTokenizer
from ostro.distributed import RayConfig
from ostro.distributed.ray import _ray_node


@pytest.fixture(scope="module")
def cluster():
    """The address of a cluster of two nodes with a worker each."""
    node = {"num_cpus": 1, "object_store_memory": 80 << 20}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        head = {**node, "include_dashboard": False}
        cluster = Cluster(initialize_head=True, head_node_args=head)
        cluster.add_node(**node)
        yield cluster.address
        cluster.shutdown()


@pytest.fixture
def request_(tmp_path):
    for index in range(8):
        texts = [f"Файл {index}, document {number}: ” don't\n" * 30 for number in range(20)]
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{index}.jsonl").write_text(lines)
    source = UrlsSource([str(tmp_path / "{0..7}.jsonl")])
    return CacheRequest("train", source, "train", BytesTokenizer().build())


class Dying(ByteTokenizer):
    """Kills the first process, other than the one that made it, that encodes something."""

    def __init__(self, mark):
        self.mark, self.maker = mark, os.getpid()

    def encode_documents(self, texts, special_tokens="text"):
        if texts and os.getpid() != self.maker:
            try:
                self.mark.touch(exist_ok=False)
            except FileExistsError:
                pass
            else:
                os.kill(os.getpid(), signal.SIGKILL)
        return super().encode_documents(texts, special_tokens)


def content(folder):
    # These are about this machine, and not part of the cache.
    beside = (".lock", ".stamps.json", ".listing")
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in beside}


def built(request, cache_dir):
    return content(open_cache(request, CacheDir(str(cache_dir))).folder)


def command_line(tmp_path, cache_dir, ray):
    """`ostro cache` of the corpus with these settings of `trainer.ray`."""
    data = f"{{train_urls: ['{tmp_path}/{{0..7}}.jsonl'], cache_dir: {tmp_path}/{cache_dir}}}"
    (tmp_path / "c.yaml").write_text(f"data: {data}\ntrainer: {{ray: {{{ray}}}}}\n")
    return ["cache", "--config_path", str(tmp_path / "c.yaml")]


def test_the_bytes_of_the_local_pool(cluster, request_, tmp_path, caplog):
    caplog.set_level("INFO", "ostro.data")
    before = signal.getsignal(signal.SIGTERM)
    assert run_command(command_line(tmp_path, "ray", f"address: '{cluster}'")) == 0
    assert f"tokenising on the Ray cluster at {cluster}, 2 workers" in caplog.text
    assert run_command(command_line(tmp_path, "local", "address: null")) == 0
    assert caplog.text.count("Ray") == 1
    assert content(tmp_path / "ray/train") == content(tmp_path / "local/train")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_killed_worker_is_retried(cluster, request_, tmp_path):
    dying = replace(request_, tokenizer=Dying(tmp_path / "died"), ray_address=cluster)
    assert built(dying, tmp_path / "ray") == built(request_, tmp_path / "local")
    assert (tmp_path / "died").exists()


def test_an_error_of_a_worker_is_the_users_line(cluster, request_, tmp_path):
    request = replace(request_, tokenizer=CharTokenizer("abc", eos=False), ray_address=cluster)
    with pytest.raises(DataError) as caught:
        built(request, tmp_path / "ray")
    assert str(caught.value).startswith("tokenizer = chars - the training text does not have")
    assert "\n" not in str(caught.value)


def test_a_cluster_that_is_not_there_is_one_line(request_, tmp_path, capsys):
    start = time.monotonic()
    assert run_command(command_line(tmp_path, "cache", "address: '127.0.0.1:1'")) == 2
    assert time.monotonic() - start < 30
    text = capsys.readouterr().err
    assert "trainer.ray.address = 127.0.0.1:1 - no Ray cluster answers there" in text
    assert text.count("\n") == 1


def test_ray_is_not_imported_without_an_address(request_, tmp_path):
    argv = command_line(tmp_path, "cache", "auto_start_cluster: false")
    code = (
        "import sys; from ostro.cli.main import run_command; "
        f"sys.exit(run_command({argv}) or 'ray' in sys.modules)"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr


@dataclass
class Host:
    """What `RayConfig.cluster` asks of a `World`, on one of two hosts."""

    is_first: bool
    heard: str | None = None
    local_rank: int = 0
    num_hosts = 2

    def from_first(self, value):
        return value if self.is_first else self.heard

    def barrier(self):
        pass


def test_a_run_of_two_hosts_starts_a_node_on_each(monkeypatch):
    started = []

    @contextmanager
    def node(*options):
        started.append(" ".join(options))
        yield
        started.remove(" ".join(options))

    monkeypatch.setattr("ostro.distributed.ray._ray_node", node)
    with RayConfig().cluster(Host(True)) as address, ExitStack() as other:
        port = address.split(":")[1]
        assert started == [f"--head --port={port} --include-dashboard=false"]
        other.enter_context(RayConfig(start_workers=False).cluster(Host(False, address)))
        # Of whose host another process takes care:
        other.enter_context(RayConfig().cluster(Host(False, address, local_rank=1)))
        assert len(started) == 1
        assert other.enter_context(RayConfig().cluster(Host(False, address))) == address
        assert started[1:] == [f"--address={address}"]
    assert not started


def test_a_node_is_there_for_the_length_of_a_block(cluster):
    def alive(ray):
        return sum(node["Alive"] for node in ray.nodes())

    with _connected(cluster) as ray:
        before = alive(ray)
        with _ray_node(f"--address={cluster}", "--num-cpus=0"):
            assert alive(ray) == before + 1
        deadline = time.monotonic() + 30
        while alive(ray) > before and time.monotonic() < deadline:
            time.sleep(0.1)
        assert alive(ray) == before


def test_ray_that_does_not_start_says_why():
    with pytest.raises(ConfigError, match=r"^trainer.ray - Ray did not start: Error: No such opt"):
        _ray_node("-0=1").__enter__()


@pytest.mark.parametrize("installed", [True, False])
def test_without_a_cluster_of_its_own(monkeypatch, caplog, installed):
    if not installed:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with RayConfig(auto_start_cluster=not installed).cluster(Host(True)) as address:
        assert address is None
    assert ("Ray is not installed" in caplog.text) is not installed


@pytest.mark.parametrize("address", ["head", "head:", "ray://head"])
def test_addresses_that_cannot_be(address):
    (problem,) = RayConfig(address=address).problems()
    assert problem.rule == "must be host:port, ray://host:port or auto"
    assert not list(RayConfig(address=f"{address.rstrip(':')}:6379").problems())
