"""The commands as typed: output, exit codes, and one clear message for each kind of mistake."""

import errno
import gzip
import json
import re
from pathlib import Path

import pytest
from tiny_run import ostro, write_config, write_text

from ostro.cli.main import run_command

REPOSITORY = Path(__file__).parents[2]


def fails(capsys, *words: str | Path) -> str:
    """Run a command that must fail with exit code 2; what it says, without a traceback."""
    assert run_command([str(word) for word in words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ostro: error: ") and "Traceback" not in err
    return err


@pytest.mark.parametrize("command", ["train", "eval", "sample", "cache", "config", "schedule"])
def test_help_names_every_setting_with_its_docstring(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run_command([command, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert ("--trainer.train_batch_size" in out) == (command != "sample")
    assert "temperature" in out
    assert f"ostro {command}" in out


def test_no_command_and_a_wrong_one(capsys):
    assert run_command([]) == 2
    assert "did you mean train?" in fails(capsys, "trian")


def test_config_show_names_the_origin_of_every_leaf(tmp_path, capsys):
    path = write_config(tmp_path)
    words = ["config", "show", "--config_path", str(path), "--optimizer.beta2", "0.9"]
    assert run_command(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.search(r": \S", line)]
    assert lines
    origin = re.compile(r"#\s+(default|derived|--[\w.]+|.*config\.yaml:\d+)$")
    assert [line for line in lines if not origin.search(line)] == []
    assert any(re.search(r"beta2: 0\.9\s+# --optimizer\.beta2$", line) for line in lines)


def test_schedule_prints_json(tmp_path, capsys):
    flags = "--trainer.num_train_steps 1000 --optimizer.warmup 0.01 --optimizer.learning_rate 6e-4"
    keep = ["--trainer.checkpointer.keep", "[{every: 300}]", "--trainer.steps_per_eval", "400"]
    words = ["schedule", "--config_path", str(write_config(tmp_path)), *flags.split(), *keep]
    assert run_command([*words, "--at", "0,5,10,505,999", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["learning_rate"] == pytest.approx(
        {"0": 0.0, "5": 3e-4, "10": 6e-4, "505": 3.3e-4, "999": 6.00014e-5}, rel=1e-5
    )
    assert found["evaluate"] == [0, 400, 800, 999]
    assert found["keep"] == [300, 600, 900, 999]


def test_schedule_plots(tmp_path):
    image = tmp_path / "lr.png"
    words = ["schedule", "--config_path", str(write_config(tmp_path)), "--plot", str(image)]
    assert run_command(words) == 0
    assert image.read_bytes().startswith(b"\x89PNG")


def test_schema_is_json_with_every_section(capsys):
    assert run_command(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    run = schema["$defs"]["TrainLmConfig"]["properties"]
    assert {"data", "trainer", "model", "optimizer"} <= set(run)
    assert (
        "batch" in schema["$defs"]["TrainerConfig"]["properties"]["train_batch_size"]["description"]
    )


def test_mistakes_of_a_newcomer_come_together(tmp_path, capsys):
    path = write_config(tmp_path, model={"num_heds": 3}, trainer={"mp": "f33"})
    err = fails(capsys, "train", "--config_path", path, "--trainer.num_train_step", "5")
    assert "model.num_heds" in err and "num_heads" in err
    assert "f33" in err and "num_train_steps" in err
    assert not (tmp_path / "logs").exists()


def test_missing_config(tmp_path, capsys):
    assert "nothing.yaml" in fails(capsys, "train", "--config_path", tmp_path / "nothing.yaml")


def test_missing_data_file(tmp_path, capsys):
    path = write_config(tmp_path, data={"train_urls": [str(tmp_path / "gone.txt")]})
    assert "gone.txt" in fails(capsys, "train", "--config_path", path)


def test_empty_corpus(tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("")
    path = write_config(tmp_path, data={"train_urls": [str(tmp_path / "empty.txt")]})
    fails(capsys, "train", "--config_path", path)


def test_corpus_smaller_than_a_window_shows_both_numbers(tmp_path, capsys):
    small = write_text(tmp_path / "small.txt", 1)
    path = write_config(tmp_path, data={"train_urls": [str(small)]})
    err = fails(capsys, "train", "--config_path", path, "--model.seq_len", "4096")
    assert "4096" in err


def test_wrong_unit(tmp_path, capsys):
    path = write_config(tmp_path)
    err = fails(capsys, "train", "--config_path", path,
                "--trainer.checkpointer.save_interval", "20 parsecs")  # fmt: skip
    assert "20m" in err


def test_unknown_type_lists_the_known_ones(tmp_path, capsys):
    path = write_config(tmp_path)
    err = fails(capsys, "train", "--config_path", path, "--model.type", "gpt3")
    assert "gpt2" in err and "llama" in err


@pytest.mark.parametrize(
    "content",
    [b"this is no gzip", gzip.compress(b"x" * 9999)[:-9]],
    ids=["unreadable", "truncated"],
)
def test_unreadable_and_truncated_gzip(tmp_path, capsys, content):
    (tmp_path / "train.jsonl.gz").write_bytes(content)
    path = write_config(tmp_path, data={"train_urls": [str(tmp_path / "train.jsonl.gz")]})
    assert "train.jsonl.gz" in fails(capsys, "train", "--config_path", path)


def test_a_checkpoint_that_is_none(tmp_path, capsys):
    (tmp_path / "step-5").mkdir()
    (tmp_path / "step-5" / "model.safetensors").write_text("no weights")
    for command in ("sample", "eval"):
        assert "step-5" in fails(capsys, command, "--checkpoint", tmp_path / "step-5")
    path = write_config(tmp_path, trainer={"initialize_from": str(tmp_path / "step-5")})
    assert "step-5" in fails(capsys, "train", "--config_path", path)


def test_a_bad_shape_is_refused_before_anything_is_built(tmp_path, capsys):
    path = write_config(tmp_path, model={"num_heads": 3})
    err = fails(capsys, "train", "--config_path", path)
    assert "hidden_dim" in err and "config.yaml:" in err
    assert not (tmp_path / "cache").exists()


def test_batch_that_does_not_come_out_even_names_its_origin(tmp_path, capsys):
    path = write_config(tmp_path)
    err = fails(capsys, "train", "--config_path", path, "--trainer.per_device_parallelism", "3")
    assert "3 * 1 = 3" in err and "config.yaml:" in err


def test_disk_full_while_saving(tmp_path, capsys, monkeypatch):
    path = write_config(tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "metrics")

    monkeypatch.setattr("ostro.checkpoint.store._write_file", full)
    err = fails(capsys, "train", "--config_path", path)
    assert "space" in err.lower()
    assert not list((tmp_path / "checkpoints").rglob("metadata.json"))


def test_sample_takes_several_prompts(tmp_path, capsys):
    assert run_command(["train", "--config_path", str(write_config(tmp_path))]) == 0
    capsys.readouterr()
    words = ["sample", "--checkpoint", str(tmp_path / "checkpoints"), "--prompt", "the ",
             "--prompt", "a ", "--max_new_tokens", "5", "--temperature", "0"]  # fmt: skip
    assert run_command(words) == 0
    first = capsys.readouterr().out
    assert "the " in first and "\na " in first
    assert run_command(words) == 0
    assert capsys.readouterr().out == first
    assert "temperature" in fails(capsys, *words[:-1], "-1")
    words[-2:] = ["--sampling.temperature=0", "--num_samples", "2"]
    assert run_command(words) == 0
    assert sorted(capsys.readouterr().out.splitlines()) == sorted(first.splitlines() * 2)
    assert "num_samples = 0" in fails(capsys, *words[:-1], "0")


@pytest.mark.cli
def test_the_example_script_takes_the_2023_commands(tmp_path):
    path = write_config(tmp_path)
    import subprocess
    import sys

    command = [sys.executable, REPOSITORY / "examples/gpt2_example.py", "--config_path", path]
    more = ["--model.num_layers", "1", "--trainer.num_train_steps", "2"]
    done = subprocess.run([*command, *more], capture_output=True, text=True, cwd=tmp_path,
                          timeout=120, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "checkpoints/tiny/step-1/metadata.json").exists()


PRESETS = sorted(path.stem for path in (REPOSITORY / "config").glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "openwebtext"])
def test_every_preset_loads_and_says_what_it_would_do(name, capsys):
    words = ["train", "--config_path", str(REPOSITORY / "config" / name), "--dry_run"]
    assert run_command(words) == 0
    out = capsys.readouterr().out
    assert "parameters: " in out and "disk for checkpoints: " in out


@pytest.mark.parametrize("name", ["quickstart", "gpt2_nano", "gpt2_small", "llama_small"])
def test_small_presets_train_a_step(name, tmp_path, capsys):
    text = write_text(tmp_path / "text.txt")
    words = f"""--data {{source: {{train_urls: [{text}]}}, tokenizer: bytes}}
--data.cache_dir {tmp_path}/cache --trainer.num_train_steps 1 --trainer.train_batch_size 1
--trainer.per_device_parallelism 1 --trainer.steps_per_eval null --trainer.tracker noop
--model.seq_len 32 --model.num_layers 1 --trainer.checkpointer.base_path {tmp_path}/ckpt
--trainer.log_dir {tmp_path}/logs --data.num_validation_sequences null --data.id null
--data.source.type urls --sampling.max_new_tokens 2"""
    flags = []
    for part in re.split(r"\s(?=--)", words):
        key, _, value = part.partition(" ")
        flags += [key, value]
    path = REPOSITORY / "config" / name
    assert run_command(["train", "--config_path", str(path), *flags]) == 0
    assert list(tmp_path.rglob("step-0/metadata.json"))


def test_ostro_is_a_command():
    done = ostro("--help")
    assert done.returncode == 0 and "ostro <command>" in done.stdout
