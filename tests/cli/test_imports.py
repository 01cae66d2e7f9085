"""Modules of the user's own: who may name them, and which commands need them."""

import json
import shutil

import pytest
import yaml
from tiny_run import ostro, write_config

TRACKER = """
from dataclasses import dataclass
from ostro.tracker import Tracker, TrackerConfig

open("imported", "a").write("tracker ")

@TrackerConfig.register_subclass("own")
@dataclass(frozen=True)
class OwnConfig(TrackerConfig):
    def build(self, run):
        return OwnTracker()

class OwnTracker(Tracker):
    name = "own"

    def log(self, metrics, step):
        pass
"""
MODEL = """
from dataclasses import dataclass
from ostro.models import Gpt2Config
from ostro.models.lm_model import LmConfig

open("imported", "a").write("model ")

@LmConfig.register_subclass("own_gpt2")
@dataclass(frozen=True)
class OwnModel(Gpt2Config):
    pass
"""
OPTIMIZER = """
from dataclasses import dataclass
from ostro.optim import AdamConfig, OptimizerConfig

open("imported", "a").write("optimizer ")

@OptimizerConfig.register_subclass("own_adam")
@dataclass(frozen=True)
class OwnAdam(AdamConfig):
    pass
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run that has its own tracker and optimizer, and one with its own model."""
    folder = tmp_path_factory.mktemp("own")
    for name, text in (("own_tracker", TRACKER), ("own_model", MODEL), ("own_adam", OPTIMIZER)):
        (folder / f"{name}.py").write_text(text)
    parts = {
        "parts": {
            "imports": ["own_tracker", "own_adam"],
            "optimizer": {"type": "own_adam"},
            "trainer": {"tracker": {"type": "own"}},
        },
        "model": {"imports": ["own_model"], "model": {"type": "own_gpt2"}},
    }
    for name, change in parts.items():
        (folder / name).mkdir()
        change = {**change, "trainer": {**change.get("trainer", {}), "id": name, "log_dir": "logs"}}
        path = write_config(folder / name, **change)
        done = ostro("train", "--config_path", path, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def run(folder, *words, fails=False):
    """What a command says, and the modules that it imported."""
    (folder / "imported").unlink(missing_ok=True)
    done = ostro(*words, cwd=folder)
    assert done.returncode == (2 if fails else 0), done.stderr
    assert "Traceback" not in done.stderr
    there = (folder / "imported").exists()
    return done.stdout + done.stderr, (folder / "imported").read_text() if there else ""


def last(folder, name):
    """The newest checkpoint of a run."""
    return max(folder.rglob(f"{name}/step-*"), key=lambda path: int(path.name[5:]))


COMMANDS = {
    "sample": ["--prompt", "the", "--max_new_tokens", "2"],
    "eval": [],
    "why": ["--step", "1"],
    "export": ["--to", "hf", "--output", "exported"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_only_the_sections_in_use_are_read(runs, command):
    shutil.rmtree(runs / "exported", ignore_errors=True)
    said, imported = run(runs, command, "--checkpoint", last(runs, "parts"), *COMMANDS[command])
    assert imported == "" and "import" not in said


@pytest.mark.parametrize("command", ["sample", "eval", "why"])
def test_a_model_of_ones_own_needs_its_module(runs, command):
    words = [command, "--checkpoint", last(runs, "model"), *COMMANDS[command]]
    said, imported = run(runs, *words, fails=True)
    assert imported == ""
    assert "model.type = own_gpt2" in said
    assert "--imports own_model" in said and "--trust" in said
    for more in (["--imports", "own_model"], ["--imports=[own_model]"], ["--trust"]):
        assert run(runs, *words, *more)[1] == "model "


def test_a_module_that_is_not_there_is_a_mistake(runs):
    words = ["sample", "--checkpoint", last(runs, "model"), "--imports", "no_such_module"]
    said, _ = run(runs, *words, fails=True)
    assert "--imports = no_such_module" in said and "cannot be imported" in said


def copies(runs, tmp_path):
    """The configuration of a checkpoint in a checkpoint that is intact, damaged, or renamed."""
    whole = last(runs, "parts")
    damaged = shutil.copytree(whole, tmp_path / "step-9")
    (damaged / "metadata.json").unlink()
    alone = tmp_path / ".tmp-step-9-1"
    alone.mkdir()
    shutil.copy(whole / "config.yaml", alone)
    renamed = shutil.copytree(damaged, tmp_path / "weights")
    (renamed / "values.json").unlink()
    link = tmp_path / "link.yaml"
    link.symlink_to(whole / "config.yaml")
    included = tmp_path / "included.yaml"
    included.write_text(f"<<: !include {whole / 'config.yaml'}\n")
    return [folder / "config.yaml" for folder in (whole, damaged, alone, renamed)] + [
        link,
        included,
    ]


def test_a_configuration_of_a_checkpoint_imports_nothing(runs, tmp_path):
    for path in copies(runs, tmp_path):
        said, imported = run(runs, "config", "show", "--config_path", path, fails=True)
        assert imported == "", path
        assert "--imports '[own_tracker, own_adam]'" in said and "--trust" in said, path
        more = ["--imports", "[own_tracker, own_adam]"]
        assert run(runs, "config", "show", "--config_path", path, *more)[1] == "tracker optimizer "
        words = ["config", "show", "--config_path", path, "--trust"]
        assert run(runs, *words)[1] == "tracker optimizer "


def test_config_diff_imports_nothing(runs, tmp_path):
    whole, damaged, *_ = copies(runs, tmp_path)
    assert run(runs, "config", "diff", whole.parent, whole.parent)[1] == ""
    for path in (damaged, damaged.parent):
        assert run(runs, "config", "diff", whole.parent, path, fails=True)[1] == ""
    words = ["config", "diff", whole.parent, damaged, "--trust"]
    assert run(runs, *words)[1] == "tracker optimizer "


def test_the_runs_own_configuration_resumes(runs):
    (path,) = (runs / "logs").rglob("parts/config.yaml")
    assert yaml.safe_load(path.read_text())["imports"] == ["own_tracker", "own_adam"]
    words = ["train", "--config_path", path, "--trainer.num_train_steps", "7"]
    assert run(runs, *words, "--trainer.load_checkpoint", "true")[1] == "tracker optimizer "
    assert json.loads((last(runs, "parts") / "values.json").read_text())["step"] == 7
