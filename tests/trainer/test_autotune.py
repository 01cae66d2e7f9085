"""Settings that a run chooses once: that choosing changes nothing else, and that it is kept."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_run import read_metrics, write_config

from ostro.checkpoint import find_latest
from ostro.cli.main import run_command
from ostro.distributed import World
from ostro.trainer import TrainerConfig, autotune, start

WORLD = World(torch.device("cpu"))
DROPOUT = {"model": {"resid_pdrop": 0.1, "attn_pdrop": 0.1, "embed_pdrop": 0.1}}


def train(path, *flags: str) -> None:
    assert run_command(["train", "--config_path", str(path), *flags]) == 0


def state(folder) -> dict[str, torch.Tensor]:
    saved = find_latest(str(folder / "checkpoints"))
    assert saved is not None
    return {f"{group}.{n}": t for group in saved.groups for n, t in saved.tensors(group).items()}


def settings(folder) -> dict:
    return yaml.safe_load((folder / "logs" / "tiny" / "config.yaml").read_text())["trainer"]


@pytest.fixture
def quick_compiler(monkeypatch):
    """Blocks are traced as ever, and their graphs run without generated code."""
    compile_ = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_(self, backend="eager"))
    monkeypatch.setattr(start, "has_compiler", lambda: True)
    monkeypatch.setattr("ostro.train_lm.has_compiler", lambda: True)
    yield
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, while tracing
@pytest.mark.parametrize("seconds", [0.001, 1.0])
def test_choosing_does_not_touch_the_run(tmp_path, monkeypatch, quick_compiler, seconds):
    """Whichever way a made-up clock decides, the run is that of the value given by hand."""
    real = torch.compiler.set_stance

    class Clock:
        """Every look costs half a second for eager steps, `seconds` for compiled ones."""

        cost = time = 0.0

        def perf_counter(self) -> float:
            self.time += self.cost
            return self.time

    def set_stance(stance: str) -> object:
        clock.cost = 0.5 if stance == "force_eager" else seconds
        return real(stance)

    clock = Clock()
    monkeypatch.setattr(torch.compiler, "set_stance", set_stance)
    monkeypatch.setattr(autotune, "time", clock)
    monkeypatch.setattr(autotune, "_LEAST_COST", 0.0)
    train(write_config(tmp_path / "auto", **DROPOUT), "--trainer.compile", "auto")
    value = settings(tmp_path / "auto")["compile"]
    assert value is (seconds < 0.5)
    train(write_config(tmp_path / "hand", **DROPOUT), "--trainer.compile", str(value).lower())
    found, expected = state(tmp_path / "auto"), state(tmp_path / "hand")
    assert [n for n, t in expected.items() if not torch.equal(t, found[n])] == []
    assert read_metrics(tmp_path / "auto") == read_metrics(tmp_path / "hand")


def test_too_short_a_run_is_not_worth_a_compilation(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "compile_blocks", lambda model: None)
    train(write_config(tmp_path), "--trainer.compile", "auto")
    assert settings(tmp_path)["compile"] is False


def test_what_was_chosen_is_kept_on_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(start, "compile_blocks", lambda model: None)
    path = write_config(tmp_path)
    auto = ("--trainer.compile", "auto")
    train(path, *auto, "--trainer.num_train_steps", "3")
    monkeypatch.setattr("ostro.train_lm.compile_pays_off", lambda *_: pytest.fail("measured again"))
    train(path, *auto)
    saved = find_latest(str(tmp_path / "checkpoints"))
    assert saved is not None and saved.values["step"] == 6
    kept = yaml.safe_load(saved.texts["config.yaml"])["trainer"]
    assert kept["compile"] is False
    assert kept["num_threads"] == torch.get_num_threads()


def saved_with(num_ranks: int = 1, **trainer: object) -> SimpleNamespace:
    text = yaml.safe_dump({"model": {}, "trainer": trainer})
    return SimpleNamespace(
        texts={"config.yaml": text}, values={"made_by": {"num_ranks": num_ranks}}
    )


def chosen_from(saved) -> TrainerConfig:
    choices = {
        "num_threads": lambda _: torch.get_num_threads(),
        "kernels": lambda _: "torch",
        "compile": lambda _: True,
    }
    return autotune.choose(TrainerConfig(compile="auto"), WORLD, saved, choices)


def test_the_number_of_threads_is_taken_over():
    threads = torch.get_num_threads()
    try:
        assert chosen_from(saved_with(num_threads=threads + 1)).num_threads == threads + 1
        assert torch.get_num_threads() == threads + 1
        torch.set_num_threads(threads)
        other = chosen_from(saved_with(num_ranks=2, num_threads=threads + 1))
        assert other.num_threads == torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "saved",
    [None, saved_with(), saved_with(compile="auto"), saved_with(compile="x", num_threads=-1)],
)
def test_what_no_checkpoint_says_is_chosen(saved):
    found = chosen_from(saved)
    assert found.compile is True
    assert found.num_threads == torch.get_num_threads()


def test_what_was_given_is_not_chosen():
    given = TrainerConfig(compile=False, num_threads=torch.get_num_threads(), kernels="torch")
    assert autotune.choose(given, WORLD, saved_with(compile=True, num_threads=99), {}) == given
