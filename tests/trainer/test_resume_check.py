"""What a resumed run says has changed, what it refuses, and that it says nothing otherwise."""

import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from tiny_run import torchrun, write_config, write_text

from ostro.checkpoint import State, find_latest, load, write
from ostro.cli.main import run_command
from ostro.config import dump_yaml
from ostro.config import load as load_config
from ostro.config.fields import dotted_names
from ostro.distributed import World
from ostro.lm_config import TrainLmConfig
from ostro.optim import AdamConfig
from ostro.trainer.resume_check import (
    NOT_COMPARED,
    POLICIES,
    Change,
    code_fingerprint,
    compare,
    record,
)

WORLD = World(torch.device("cpu"))
BASE = ["--data.source", "stdlib"]
MIXED = ["--data.source", "null", "--data.configs"]
DETERMINISTIC = ["--trainer.deterministic_reduction", "true"]


def make(flags: list[str], **facts):
    """A configuration, what its checkpoints hold of it, and where its settings come from."""
    loaded = load_config(TrainLmConfig, [], [*BASE, *flags])
    given = {"vocab_size": 257, "tokenizer": "bytes", "data": {"train": "a"}} | facts
    saved = record(given.pop("world", WORLD), **given, origins=loaded.origins)
    return loaded.config, saved, loaded.origins


def changes(before, after) -> list[Change]:
    """What a run `after` says of a checkpoint of `before`, both from `make`."""
    config, now, origins = after
    return compare(config, now, yaml.safe_load(dump_yaml(before[0])), before[1], origins)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([], [], {}),
        ([], ["--trainer.id", "x", "--trainer.load_checkpoint_path", "y"], {}),
        ([], ["--trainer.num_train_steps", "9"], {"trainer.num_train_steps": "warn"}),
        (["--optimizer.schedule_steps", "6"],
         ["--optimizer.schedule_steps", "6", "--trainer.num_train_steps", "9"],
         {"trainer.num_train_steps": "accept"}),
        ([], ["--vocab_size", "257"], {}),  # as many rows as null came to
        ([], ["--trainer.log_interval", "3"], {"trainer.log_interval": "accept"}),
        ([], ["--data.cache_dir", "x"], {"data.cache_dir": "accept"}),
        ([], ["--model.gradient_checkpointing", "false"],
         {"model.gradient_checkpointing": "accept"}),
        ([], ["--optimizer.learning_rate", "1e-3"], {"optimizer.learning_rate": "warn"}),
        (["--optimizer.warmup", "1"], ["--optimizer.warmup", "1.0"], {"optimizer.warmup": "warn"}),
        ([], ["--optimizer.lr_schedule", "linear"], {"optimizer.lr_schedule.type": "warn"}),
        ([], ["--optimizer.skip_bad_steps", "{sigma_factor: 4}"],
         {"optimizer.skip_bad_steps": "warn"}),
        ([], ["--trainer.seed", "1"], {"trainer.seed": "warn"}),
        ([], ["--data.shuffle", "false"], {"data.shuffle": "warn"}),
        ([], ["--model.resid_pdrop", "0.1"], {"model.resid_pdrop": "warn"}),
        ([], ["--model.seq_len", "512"], {"model.seq_len": "warn"}),
        ([], ["--trainer.per_device_parallelism", "1"],
         {"trainer.per_device_parallelism": "warn"}),
        (DETERMINISTIC, [*DETERMINISTIC, "--trainer.per_device_parallelism", "1"],
         {"trainer.per_device_parallelism": "accept"}),
        ([], [*DETERMINISTIC, "--trainer.per_device_parallelism", "1"],
         {"trainer.per_device_parallelism": "warn", "trainer.deterministic_reduction": "warn"}),
        ([], ["--model.num_heads", "6"], {"model.num_heads": "refuse"}),
        ([*MIXED, "{a: stdlib}"], [*MIXED, "{a: stdlib, b: stdlib}", "--data.train_weights",
                                   "{a: 1, b: 1}"],
         {"data.configs.b": "accept", "data.train_weights": "warn"}),
        # another type is one change, whatever lies below it
        ([], ["--model.type", "llama"], {"model.type": "refuse"}),
        ([], ["--trainer.tracker", "[console, noop]"], {"trainer.tracker": "accept"}),
        (["--trainer.tracker", "[console, noop]"],
         ["--trainer.tracker", "[console, tensorboard]"], {"trainer.tracker.1.type": "accept"}),
        # the user's word counts, the longest first, and above all rows of ours
        ([], ["--model.num_heads", "6", "--trainer.resume_policy", "{model: accept}"],
         {"model.num_heads": "accept"}),
        ([], ["--optimizer.beta1", "0.8", "--optimizer.beta2", "0.9",
              "--trainer.resume_policy", "{optimizer: refuse, optimizer.beta2: accept}"],
         {"optimizer.beta1": "refuse", "optimizer.beta2": "accept"}),
    ],
)  # fmt: skip
def test_every_change_has_a_policy(before, after, expected):
    assert {c.key: c.policy for c in changes(make(before), make(after))} == expected


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"vocab_size": 300}, {"made_by.vocab_size": "refuse"}),
        ({"tokenizer": "others"}, {"made_by.tokenizer": "refuse"}),
        ({"data": {"train": "b"}}, {"made_by.data.train": "warn"}),
        ({"data": {"train": "a", "more/train": "c"}}, {"made_by.data.more/train": "warn"}),
        ({"world": World(torch.device("cpu"), num_ranks=2)}, {"made_by.num_ranks": "warn"}),
    ],
)
def test_what_else_decides_the_numbers(facts, expected):
    assert {c.key: c.policy for c in changes(make([]), make([], **facts))} == expected
    assert changes(make(DETERMINISTIC), make(DETERMINISTIC)) == []


def test_other_versions_and_threads_are_named():
    before, after = make([]), make([])
    for key in ("ostro", "code", "python", "torch", "num_threads"):
        before[1]["made_by"][key] = "old"
    found = {change.key: change.policy for change in changes(before, after)}
    warned = ("ostro", "code", "torch", "num_threads")
    assert found == {f"made_by.{key}": "warn" for key in warned} | {"made_by.python": "accept"}


def test_a_line_says_both_values_the_origin_and_why():
    (change,) = changes(make([]), make(["--optimizer.learning_rate", "5e-4"]))
    assert str(change) == (
        "optimizer.learning_rate: was 0.0001, now 0.0005 (--optimizer.learning_rate) - warn -"
        " takes effect from the next step on"
    )


def test_a_default_that_changed_is_told_from_a_flag_that_was_left_out(monkeypatch):
    before, flagged = make([]), make(["--optimizer.weight_decay", "0.1"])
    field = TrainLmConfig.__dataclass_fields__["optimizer"]
    monkeypatch.setattr(field, "default_factory", lambda: AdamConfig(weight_decay=0.3))
    (drifted,) = changes(before, make([]))
    assert drifted.what == "was 0.0, now 0.3 (the default has changed)"
    (left_out,) = changes(flagged, make([]))
    assert left_out.what == "was 0.1, now 0.3 (default)"
    (typed,) = changes(before, make(["--optimizer.weight_decay", "0.3"]))
    assert typed.what == "was 0.0, now 0.3 (--optimizer.weight_decay)"
    before[1]["given"] = None  # made in code: nobody knows
    (unknown,) = changes(before, make([]))
    assert unknown.what == "was 0.0, now 0.3 (default)"


def test_settings_of_other_versions_are_named_and_not_refused_unasked():
    config, saved, origins = make([])
    old = yaml.safe_load(dump_yaml(config))
    old["model"]["parallel_blocks"] = True
    del old["model"]["upcast_attn"], old["model"]["use_bias"], old["trainer"]["log_interval"]
    found = {c.key: c for c in compare(config, saved, old, saved, origins)}
    gone, new = found.pop("model.parallel_blocks"), found.pop("model.use_bias")
    assert gone.what == "was true, and this version has no such setting"
    assert new.what == "is new in this version, true (default)"
    assert {gone.policy, new.policy, found["model.upcast_attn"].policy} == {"warn"}
    assert found["trainer.log_interval"].policy == "accept" and len(found) == 2
    config, now, origins = make(["--model.use_bias", "false"])
    found = {c.key: c for c in compare(config, now, old, saved, origins)}
    assert found["model.use_bias"].policy == "refuse", "somebody chose it"


def test_a_checkpoint_without_a_record_is_compared_by_its_settings():
    config, now, origins = make(["--model.num_heads", "6"])
    (change,) = compare(config, now, yaml.safe_load(dump_yaml(make([])[0])), {"step": 3}, origins)
    assert change.key == "model.num_heads" and "default" not in change.what


def test_the_table_names_settings_that_there_are():
    known = {"", *dotted_names(TrainLmConfig)}
    known |= {f"made_by.{name}" for name in make([])[1]["made_by"]}
    assert set(POLICIES) <= known
    assert known >= NOT_COMPARED


def test_the_fingerprint_of_code_goes_with_its_text(tmp_path):
    (tmp_path / "a" / "inner").mkdir(parents=True)
    (tmp_path / "a" / "one.py").write_text("x = 1\n")
    (tmp_path / "a" / "inner" / "two.py").write_text("y = 2\n")
    first = code_fingerprint(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    os.utime(tmp_path / "b" / "one.py", (0, 0))
    (tmp_path / "b" / "notes.txt").write_text("no code")
    assert code_fingerprint(tmp_path / "b") == first
    (tmp_path / "b" / "one.py").write_text("x = 2\n")
    assert code_fingerprint(tmp_path / "b") != first
    (tmp_path / "a" / "one.py").rename(tmp_path / "a" / "three.py")
    assert code_fingerprint(tmp_path / "a") != first


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A tiny run that made its 6 updates."""
    folder = tmp_path_factory.mktemp("trained")
    assert run_command(["train", "--config_path", str(write_config(folder))]) == 0
    return folder


@pytest.fixture
def run(trained, tmp_path, capsys):
    """Go on with a copy of it in a folder of its own; exit code, and what was said of changes."""
    shutil.copytree(trained, tmp_path / "run")
    path = write_config(
        tmp_path / "run",
        data={"cache_dir": str(tmp_path / "run" / "cache")},
        optimizer={"schedule_steps": 6},
    )

    def go_on(*flags: str) -> tuple[int, list[str], str]:
        longer = ["--trainer.num_train_steps", "8"]
        capsys.readouterr()
        code = run_command(["train", "--config_path", str(path), *longer, *flags])
        out, err = capsys.readouterr()
        return code, [line for line in out.splitlines() if ": was " in line], err

    go_on.folder = tmp_path / "run"
    return go_on


LONGER = {"trainer.num_train_steps", "optimizer.schedule_steps"}


def keys(lines: list[str]) -> set[str]:
    return {line.removeprefix("warning: ").partition(": was ")[0] for line in lines}


def test_an_unchanged_run_says_where_it_goes_on_and_no_more(tmp_path, capsys):
    path = write_config(tmp_path, trainer={"checkpointer": {"keep": [{"every": 3}]}})
    words = ["train", "--config_path", str(path)]
    assert run_command(words) == 0
    shutil.rmtree(tmp_path / "checkpoints" / "tiny" / "step-5")
    capsys.readouterr()
    assert run_command(words) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("resuming from"))
    assert lines[start].endswith("step-3") and lines[start + 1].startswith("model: ")


def test_changes_are_told_one_by_one_and_the_run_goes_on(run):
    code, lines, _ = run("--optimizer.learning_rate", "5e-3", "--trainer.log_interval", "1")
    moved = {"data.train_urls", "data.validation_urls", "data.cache_dir", "trainer.log_dir",
             "trainer.checkpointer.base_path"}  # fmt: skip
    assert code == 0
    assert keys(lines) - moved == {*LONGER, "optimizer.learning_rate", "trainer.log_interval"}
    (rate,) = (line for line in lines if "learning_rate: " in line)
    assert rate.startswith("warning: optimizer.learning_rate: was 0.01, now 0.005 (--optimizer")
    (interval,) = (line for line in lines if "log_interval" in line)
    assert "now 1 (--trainer.log_interval) - accept" in interval and "warning" not in interval
    noted = find_latest(str(run.folder / "checkpoints")).values["given"]
    assert "optimizer.learning_rate" in noted and "optimizer.beta1" not in noted


def test_all_that_is_refused_is_named_before_anything_is_written(run):
    config = run.folder / "logs" / "tiny" / "config.yaml"
    before = config.read_text(), sorted(run.folder.rglob("checkpoints/**/*"))
    flags = ["--model.num_heads", "4", "--data.tokenizer", "chars", "--data.cache_dir",
             str(run.folder / "other")]  # fmt: skip
    code, lines, error = run(*flags)
    assert code == 2
    for part in ("step-5 - ", "model.num_heads: was 2, now 4 (--model.num_heads) - refuse",
                 "made_by.tokenizer: was bytes, now ", "made_by.vocab_size: was 257, now ",
                 "--trainer.resume_policy '{model.num_heads: warn, made_by.vocab"):  # fmt: skip
        assert part in error
    assert keys(lines) >= {"made_by.data.train", "made_by.data.validation"}
    assert (config.read_text(), sorted(run.folder.rglob("checkpoints/**/*"))) == before
    code, _, error = run(*flags[:2], "--trainer.resume_policy", "{model.num_heads: warn}")
    assert code == 0, "heads have no shape of their own"


def test_what_is_accepted_still_has_to_fit(run):
    flags = ["--model.hidden_dim", "32", "--trainer.resume_policy", "{model: accept}"]
    code, lines, error = run(*flags)
    assert code == 2 and "has shape (257, 16), here it is (257, 32)" in error
    assert "model.hidden_dim" in keys(lines)


def test_other_text_in_a_rebuilt_cache_is_named(run):
    write_text(run.folder / "train.txt", seed=5)
    code, lines, _ = run("--data.train_urls", f"[{run.folder / 'train.txt'}]",
                         "--data.rebuild_cache", "true")  # fmt: skip
    assert code == 0
    (line,) = (line for line in lines if " made_by" in line.partition(": was")[0])
    assert line.startswith("warning: made_by.data.train: was ") and "not the same as before" in line


def test_a_changed_default_is_named(run, monkeypatch):
    field = TrainLmConfig.__dataclass_fields__["optimizer"]
    monkeypatch.setattr(field, "default_factory", lambda: AdamConfig(max_grad_norm=0.5))
    code, lines, _ = run()
    assert code == 0
    (line,) = (line for line in lines if "max_grad_norm" in line)
    assert "was 1.0, now 0.5 (the default has changed) - warn" in line


def test_a_checkpoint_of_an_older_version_loads_and_says_what_it_does_not_hold(run):
    folder = run.folder / "checkpoints" / "tiny"
    saved = load(str(folder / "step-5"))
    values = {k: v for k, v in saved.values.items() if k not in ("made_by", "given")}
    old = yaml.safe_load(saved.texts["config.yaml"])
    del old["trainer"]["resume_policy"]
    old["optimizer"]["nesterov"] = False
    texts = {**saved.texts, "config.yaml": yaml.safe_dump(old)}
    tensors = {group: saved.tensors(group) for group in saved.groups}
    write(str(folder), State(tensors, values, texts), step=5, is_temporary=False, run_id="tiny")
    code, lines, _ = run()
    assert code == 0
    log = (run.folder / "logs" / "tiny" / "train.log").read_text()
    assert "has no environment record: cannot check that code, tokenizer and data" in log
    assert any("optimizer.nesterov: was false, and this version has no" in line for line in lines)
    assert not any(key.startswith("made_by") for key in keys(lines))


def test_two_configurations_or_checkpoints_are_compared(run, capsys):
    assert run("--optimizer.learning_rate", "5e-3")[0] == 0
    folder = run.folder

    def diff(before: Path, after: Path) -> set[str]:
        capsys.readouterr()
        assert run_command(["config", "diff", str(before), str(after)]) == 0
        return keys(capsys.readouterr().out.splitlines())

    checkpoints = folder / "checkpoints" / "tiny"
    found = diff(checkpoints / "step-5", folder / "checkpoints")
    assert found >= {*LONGER, "optimizer.learning_rate"} and "model.num_heads" not in found
    # the log's folder of the second run against the file it was started with
    changed = {"optimizer.learning_rate", "trainer.num_train_steps"}
    assert diff(folder / "config.yaml", folder / "logs" / "tiny") == changed
    assert diff(folder / "config.yaml", folder / "config.yaml") == {
        "nothing that counts is different"
    }
    assert run_command(["config", "diff", str(folder / "config.yaml")]) == 2
    assert run_command(["config", "diff", str(folder / "config.yaml"), "nope"]) == 2
    assert "nope" in capsys.readouterr().err


@pytest.mark.dist
def test_two_ranks_say_it_once_and_refuse_together(run):
    words = ["train", "--config_path", run.folder / "config.yaml", "--trainer.num_train_steps", "8"]
    done = torchrun(2, *words, "--model.num_heads", "4")
    assert done.returncode != 0
    assert done.stdout.count("warning: made_by.num_ranks: was 1, now 2 - warn") == 1
    assert done.stderr.count("model.num_heads: was 2, now 4 (--model.num_heads) - refuse") == 1


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        ("{model.num_hads: warn}", ["resume_policy.model.num_hads", "did you mean model.num_head"]),
        ("{made_by.tokeniser: warn}", ["did you mean made_by.tokenizer?"]),
        ("{model: allow}", ["must be one of accept, warn, refuse"]),
    ],
)
def test_slips_in_policies_are_named(run, policy, parts):
    code, _, error = run("--trainer.resume_policy", policy)
    assert code == 2
    for part in parts:
        assert part in error
