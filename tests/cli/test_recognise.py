"""A file of another command line: the error says what it is, and what it says to type works."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny_run import ostro

from ostro.cli import nanogpt
from ostro.core.errors import ConfigError
from ostro.runtime.signals import Signals

ROOT = Path(__file__).parents[2]
FILES = {
    "native.yaml": {"data": {"source": "stdlib"}, "trainer": {"seed": 1}, "model": "gpt2"},
    "nano file.yaml": {"batch_size": 8, "block_size": 16, "dataset": "x"},
    "model.yaml": {"n_layers": 1, "d_model": 16, "n_heads": 2, "learning_rate": 1e-3},
    "training.yaml": {"data": {"source": "stdlib"}, "optimizer": {"type": "AdamW"},
                      "max_steps": 3, "batch_size": 4},
}  # fmt: skip
NATIVE, NANO = ["ostro", "train"], ["python", str(ROOT / "train.py")]
GPT3 = ["python3", str(ROOT / "src" / "train.py")]
NANO_FILE = "is a configuration of nanoGPT's `train.py`"


@pytest.fixture
def folder(tmp_path) -> Path:
    for name, content in FILES.items():
        (tmp_path / name).write_text(yaml.safe_dump(content))
    (tmp_path / "nano.py").write_text("batch_size = 2 * 4\n")
    return tmp_path


def type_here(words: list[str], folder: Path) -> subprocess.CompletedProcess:
    done = ostro(*(words[1:] if words[0] == "ostro" else words), cwd=folder)
    assert "Traceback" not in done.stderr, done.stderr
    return done


@pytest.mark.parametrize(
    ("words", "said", "command"),
    [
        ([*NATIVE, "--config_path", "nano file.yaml"], NANO_FILE, [*NANO, "nano file.yaml"]),
        ([*NATIVE, "nano file.yaml"], NANO_FILE, [*NANO, "nano file.yaml"]),
        ([*NATIVE, "--config_path=nano.py"], NANO_FILE, [*NANO, "nano.py"]),
        (["ostro", "schedule", "--config_path", "nano file.yaml"], NANO_FILE, None),
        ([*NATIVE, "--config", "model.yaml", "--training_config", "training.yaml"],
         "is a GPT-3 style model file",
         [*GPT3, "--config", "model.yaml", "--training_config", "training.yaml"]),
        ([*NATIVE, "--config_path", "training.yaml"], "is a GPT-3 style training file",
         [*GPT3, "--model_size", "125M", "--training_config", "training.yaml"]),
        ([*NANO, "native.yaml"], "is a configuration of `ostro train`",
         [*NATIVE, "--config_path", "native.yaml"]),
        ([*NANO, "--config_path", "native.yaml"], "is a configuration of `ostro train`",
         [*NATIVE, "--config_path", "native.yaml"]),
        ([*NANO, "model.yaml"], "is a GPT-3 style model file", [*GPT3, "--config", "model.yaml"]),
        ([*GPT3, "--config", "native.yaml"], "is a configuration of `ostro train`",
         [*NATIVE, "--config_path", "native.yaml"]),
        ([*GPT3, "--config", "nano file.yaml"], NANO_FILE, [*NANO, "nano file.yaml"]),
        ([*GPT3, "--config", "nano.py"], NANO_FILE, [*NANO, "nano.py"]),
    ],
)  # fmt: skip
def test_another_command_lines_file(folder, words, said, command):
    done = type_here(words, folder)
    assert done.returncode == 2 and said in done.stderr, done.stderr
    told = dict(re.findall(r"^  (train with it|make a native one): +(.*)$", done.stderr, re.M))
    if command is not None:
        assert shlex.split(told["train with it"]) == command
    if command is not None and command[-1] != "model.yaml":  # whose data is not here
        dry = type_here([*shlex.split(told["train with it"]), "--dry_run"], folder)
        assert dry.returncode == 0, dry.stderr
    if "make a native one" in told and words[-1] != "training.yaml":
        assert type_here(shlex.split(told["make a native one"]), folder).returncode == 0
        shown = type_here(["ostro", "config", "show", "--config_path", "native.yaml"], folder)
        assert shown.returncode == 0, shown.stderr


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ([*GPT3, "--config", "training.yaml", "--training_config", "model.yaml"],
         ["--config training.yaml - is a GPT-3 style training file",
          "give it as --config model.yaml"]),
        ([*GPT3, "model.yaml", "training.yaml"],
         ["give it as --config model.yaml", "give it as --training_config training.yaml"]),
        ([*NATIVE, "native.yaml"], ["write --config_path native.yaml"]),
        ([*NANO, "nano file.yaml", "blocksize=3"], ["did you mean block_size?"]),
        ([*NATIVE, "--config_path", "native.yaml", "--trainer.sed", "3"],
         ["did you mean seed?"]),
        (["ostro", "sample", "--checkpoint", "runs", "--prompt", "nano.py", "--typo", "3"],
         ["typo"]),
    ],
)  # fmt: skip
def test_a_slip_within_one_command_line_is_told_as_such(folder, words, parts):
    done = type_here(words, folder)
    assert done.returncode == 2 and all(part in done.stderr for part in parts), done.stderr
    assert "train with it" not in done.stderr


def test_nanogpts_first_line_says_how_to_make_its_data(tmp_path):
    """From any folder; what it says to type makes the data, here of a text at hand."""
    words = [*NANO, "config/train_shakespeare_char.py"]
    done = type_here(words, tmp_path)
    assert done.returncode == 2 and "there is no data/shakespeare_char/train.bin" in done.stderr
    command = done.stderr.strip().partition("make it with: ")[2]
    (tmp_path / "text.txt").write_text("To be, or not to be\n" * 200)
    script = [*shlex.split(command), "--text_file", "text.txt"]
    subprocess.run([sys.executable, *script[1:]], cwd=tmp_path, check=True, timeout=120)
    # nanoGPT's README for a CPU, but for the number of iterations.
    small = ("--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64"
             " --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
             " --lr_decay_iters=2000 --dropout=0.0").replace("2000", "2")  # fmt: skip
    done = type_here([*words, *small.split()], tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out-shakespeare-char" / "ckpt.pt").exists()


def test_a_dataset_that_is_not_read_need_not_be_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    started = []
    monkeypatch.setattr(
        nanogpt, "start_run", lambda loaded, *_, **__: started.append(loaded.config.data.train_urls)
    )
    words = ["--data.source=null", "--data.train_urls=[text.txt]", "--data.tokenizer=chars"]
    nanogpt.train(words, Signals())
    assert started == [["text.txt"]]
    with pytest.raises(ConfigError, match=r"there is no data/nowhere/train\.bin"):
        nanogpt.train(["dataset=nowhere"], Signals())


def test_the_shipped_example_has_nanogpts_values(tmp_path):
    from ostro.config.scalars import plain

    layer = nanogpt.read_python(str(ROOT / "config" / "train_shakespeare_char.py"))
    assert {key: plain(node) for key, node in layer.items.items()} == {
        "out_dir": "out-shakespeare-char", "eval_interval": 250, "eval_iters": 200,
        "log_interval": 10, "always_save_checkpoint": False, "wandb_log": False,
        "wandb_project": "shakespeare-char", "wandb_run_name": "mini-gpt",
        "dataset": "shakespeare_char", "gradient_accumulation_steps": 1, "batch_size": 64,
        "block_size": 256, "n_layer": 6, "n_head": 6, "n_embd": 384, "dropout": 0.2,
        "learning_rate": 1e-3, "max_iters": 5000, "lr_decay_iters": 5000, "min_lr": 1e-4,
        "beta2": 0.99, "warmup_iters": 100,
    }  # fmt: skip


def test_a_config_file_that_is_not_there(tmp_path):
    done = type_here([*NANO, "config/train_shakespear_char.py"], tmp_path)
    path = os.path.relpath(ROOT / "config" / "train_shakespeare_char.py", tmp_path)
    assert done.returncode == 2 and f"did you mean {path}?" in done.stderr
