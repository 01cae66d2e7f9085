"""Ranks with other settings, text or code than the rest end before they train."""

import dataclasses
import subprocess
import sys
import threading
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_run import PLAIN, free_port, write_config, write_text

from ostro.core.errors import ConfigError, OstroError
from ostro.distributed.launchers import RankInfo
from ostro.distributed.rendezvous import Rendezvous
from ostro.lm_config import TrainLmConfig
from ostro.trainer import rank_check
from ostro.trainer.rank_check import Fact, agreeing, facts_of_data, require_agreement

pytestmark = pytest.mark.dist

TIMEOUT = timedelta(seconds=60)


def outcomes(facts: list[Mapping[str, Fact]]) -> list[str | None]:
    """What each of so many ranks, threads of this process, is told when they compare these."""
    address, found = f"127.0.0.1:{free_port()}", [None] * len(facts)

    def take_part(rank: int) -> None:
        try:
            rendezvous = Rendezvous(RankInfo(None, rank, len(facts), address=address), TIMEOUT)
            meetings.append(rendezvous)
            rendezvous.gather(TIMEOUT)
            require_agreement(rendezvous, "settings", facts[rank], TIMEOUT)
        except OstroError as error:
            assert isinstance(error, ConfigError), error
            found[rank] = str(error)

    meetings: list[Rendezvous] = []  # the store stays until all have ended
    threads = [threading.Thread(target=take_part, args=[r]) for r in range(len(facts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_equal_facts_and_other_origins():
    facts = [{"trainer.seed": Fact("3", f"--trainer.seed of {rank}")} for rank in range(3)]
    assert outcomes(facts) == [None] * 3


def test_one_rank_of_many_is_named():
    """As one of 64 the odd rank is told of as such, though it is the first."""
    same = {"trainer.seed": Fact("3", "c.yaml:4"), "data.shuffle": Fact("true")}
    odd = {"trainer.seed": Fact("4", "--trainer.seed"), "data.shuffle": Fact("true")}
    said = set(outcomes([odd, *[same] * 63]))
    assert said == {
        "trainer.seed = 4 (--trainer.seed) - is what rank 0 has; ranks 1, 2, 3, 4 and 59 more have"
        " 3 (c.yaml:4) - start all ranks with the same settings"
    }


def test_what_only_some_have_and_several_kinds():
    kinds = [
        {"a": Fact("1"), "optimizer.type": Fact("adam"), "optimizer.beta1": Fact("0.9")},
        {"a": Fact("2"), "optimizer.type": Fact("muon"), "optimizer.momentum": Fact("0.9")},
        {"optimizer.type": Fact("adam"), "optimizer.beta1": Fact("0.9")},
    ]
    (text,) = set(outcomes(kinds))
    lines = [line.partition(" - start")[0].strip() for line in text.splitlines()[1:]]
    assert lines == [
        "a = 2 - is what rank 1 has; rank 0 has 1",
        "optimizer.type = muon - is what rank 1 has; rank 0 has adam",
        "a = nothing - is what rank 2 has; rank 0 has 1",
    ]


def facts_of(changes: Mapping[str, object], environ: Mapping[str, str], monkeypatch) -> dict:
    """The facts of a configuration with some settings of `trainer` and `data` changed."""
    config = TrainLmConfig()
    for name, value in changes.items():
        section, field = name.split(".")
        part = dataclasses.replace(getattr(config, section), **{field: value})
        config = dataclasses.replace(config, **{section: part})
    taken: list[dict] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            rank_check, "require_agreement", lambda m, topic, facts, t: taken.append(facts)
        )
        for name, value in environ.items():
            patch.setenv(name, value)
        agreeing(config, {})(None)  # type: ignore[arg-type]
    return {name: fact.value for name, fact in taken[0].items()}


@pytest.mark.parametrize(
    ("changes", "environ", "differ"),
    [
        ({"trainer.seed": 3}, {}, {"trainer.seed"}),
        ({"trainer.log_interval": 3}, {}, {"trainer.log_interval"}),
        ({"trainer.id": "x"}, {}, {"trainer.id", "RUN_ID"}),
        ({}, {"RUN_ID": "x"}, {"RUN_ID"}),
        ({"data.train_urls": ["a", "b"]}, {}, {"data.train_urls"}),
        ({"data.tags": list("abcdefg")}, {}, {"data.tags", "data.tags.length"}),
        ({"trainer.device": "cpu"}, {}, set()),
        ({"data.cache_dir": "/scratch", "data.num_workers": 3}, {}, set()),
        ({"trainer.log_dir": "/scratch", "trainer.log_level": "ERROR"}, {}, set()),
    ],
)
def test_what_is_compared(changes, environ, differ, monkeypatch):
    monkeypatch.delenv("RUN_ID", raising=False)
    before, after = (facts_of(c, e, monkeypatch) for c, e in (({}, {}), (changes, environ)))
    names = {n for n in {*before, *after} if before.get(n) != after.get(n)}
    assert {name for name in names if not name.startswith("data.tags.") or "len" in name} == differ
    assert {"torch", "code of ostro", "kind of device"} <= set(after)


def test_credentials_stay_at_home(monkeypatch):
    changes = {"data.train_urls": ["https://user:hunter22@host/file.txt"]}
    values = " ".join(facts_of(changes, {}, monkeypatch).values())
    assert "host/file.txt" in values and "hunter22" not in values


def found(text: str) -> tuple:
    """A tokenizer, the number of its ids, and data whose training text has this fingerprint."""
    data = SimpleNamespace(contents={"train": text, "validation": "same"}, fingerprint=text)
    return SimpleNamespace(fingerprint="t"), 256, data


def test_data_that_differs_is_named():
    """What all ranks found under the same settings, but one with another file."""
    usual, odd = (facts_of_data(*found(text)) for text in ("old", "new"))
    (text,) = set(outcomes([usual, odd]))
    assert "text of train = new - is what rank 1 has; rank 0 has old - let all ranks read" in text


def train(folder: Path, words: Mapping[int, list[str]]) -> list[tuple[int, str]]:
    """Exit code and output of two ranks that train with these flags, each in its own folder."""
    port, processes = free_port(), []
    for rank in range(2):
        environ = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}
        environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-m", "ostro.cli.main", "train", "--config_path", "config.yaml"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(
            subprocess.Popen(
                [*command, *words.get(rank, [])],
                cwd=folder / str(rank),
                env=PLAIN | environ | {"PYTHONSAFEPATH": "1"},
                **pipes,
            )
        )
    texts = [process.communicate(timeout=120)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]


@pytest.mark.parametrize("how", ["setting", "text"])
def test_two_ranks_that_differ_train_nothing(tmp_path, how):
    for rank in range(2):
        folder = tmp_path / str(rank)
        write_config(folder, data={"train_urls": ["train.txt"], "cache_dir": "cache"})
        write_text(folder / "train.txt", seed=rank)
    text = (tmp_path / "0" / "config.yaml").read_text()
    (tmp_path / "1" / "config.yaml").write_text(text)
    words = {1: ["--trainer.train_batch_size", "8"]} if how == "setting" else {}
    (first, said), (second, silent) = train(tmp_path, words)
    assert (first, second) == (2, 2), said + silent
    setting = {"setting": "trainer.train_batch_size = 8", "text": "text of train ="}[how]
    assert setting in said and "is what rank 1 has; rank 0 has" in said
    assert "error" not in silent, "said once"
    assert not list(tmp_path.glob("*/checkpoints/tiny/step-*"))
