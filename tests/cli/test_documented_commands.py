"""Every command of the guides, as it stands there: large ones dry, small ones trained."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_run import write_text

pytestmark = pytest.mark.cli

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent


def documented() -> dict[str, list[str]]:
    """The commands of each guide, in their order."""
    text = Path(__file__).with_name("documented_commands.md").read_text()
    found = {}
    for part in text.split("\n## guide ")[1:]:
        blocks = re.findall(r"```\n(.*?)```", part, re.S)
        lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
        found[part[:3]] = [line for line in lines if line.strip() and not line.startswith("#")]
    return found


COMMANDS = documented()


def run(command: str, *more: str, cwd: Path = ROOT, code: int = 0, **env: str):
    """Run a command of the guides with words after it."""
    command = command.replace("levanter/examples/", "examples/").replace("pytho3 ", "python3 ")
    program, *words = shlex.split(command)
    if cwd != ROOT:  # the scripts are where the repository is
        words = [str(ROOT / w) if w.endswith(".py") else w for w in words]
    program = sys.executable if program.startswith("python") else str(BIN / program)
    environ = {**os.environ, "WANDB_MODE": "offline", "WANDB_SILENT": "true", **env}
    environ["PATH"] = f"{BIN}{os.pathsep}{environ['PATH']}"
    done = subprocess.run(
        [program, *words, *more],
        cwd=cwd, env=environ, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def parameters(done: subprocess.CompletedProcess) -> int:
    return int(re.search(r"^parameters: (\d+)", done.stdout, re.M)[1])


def test_there_are_as_many_as_in_the_guides():
    assert {name: len(commands) for name, commands in COMMANDS.items()} == {
        "000": 2, "001": 7, "002": 5, "003": 5
    }  # fmt: skip


@pytest.mark.parametrize("number", range(7))
def test_levanters_commands_dry(number):
    """Guide 000's commands are the first two of guide 001."""
    assert COMMANDS["001"][:2] == COMMANDS["000"]
    command = COMMANDS["001"][number]
    if ",group" in command:
        done = run(command, "--dry_run", code=2)
        assert "did you mean --trainer.wandb.group?" in done.stderr
        command = command.replace(",group", ".group")
    done = run(command, "--dry_run")
    assert parameters(done) == (774_030_080 if "num_layers 36" in command else 124_439_808)
    if "num_train_steps" in command:
        assert "steps: 10000" in done.stdout
    if "batch_size 256" in command:
        assert "256 examples of 1024 tokens = 4 micro-batches x 64 examples" in done.stdout


def test_from_the_parent_of_the_clone(tmp_path):
    done = run(COMMANDS["000"][0], "--dry_run", cwd=tmp_path)
    assert parameters(done) == 124_439_808


@pytest.fixture
def small(tmp_path) -> list[str]:
    """Settings after which a run of gpt2_small.yaml is a tiny one."""
    write_text(tmp_path / "train.txt")
    write_text(tmp_path / "val.txt", 300, seed=1)
    words = {
        "data": "{id: null, num_validation_sequences: null, tokenizer: bytes, cache_dir: cache,"
        f" train_urls: [{tmp_path}/train.txt], validation_urls: [{tmp_path}/val.txt]}}",
        "model.num_layers": "1", "model.num_heads": "2", "model.hidden_dim": "16",
        "model.seq_len": "16", "trainer.per_device_parallelism": "2", "trainer.mp": "f32",
        "trainer.device": "cpu", "optimizer.warmup": "2",
    }  # fmt: skip
    return [word for name, value in words.items() for word in (f"--{name}", value)]


def test_levanters_commands_train_and_resume(tmp_path, small):
    """The checkpoint command under the run's name, then the one that resumes the wandb run."""
    _, _, checkpoints, _, _, _, resume = COMMANDS["001"]
    named = ["--trainer.wandb.name", "wandb_run_name", "--trainer.train_batch_size", "4"]
    done = run(checkpoints, *small, *named, "--trainer.num_train_steps", "4", cwd=tmp_path)
    assert "no complete checkpoint there" in done.stdout
    assert list((tmp_path / "checkpoints" / "gpt2").glob("*/step-3/metadata.json"))
    more = ["--trainer.num_train_steps", "6", "--trainer.train_batch_size", "4"]
    done = run(resume, *small, *more, cwd=tmp_path)
    assert "continuing from checkpoints/gpt2/" in done.stdout
    assert "Trained 2 steps" in done.stdout
    assert (tmp_path / "logs" / "asdf1234" / "train.log").exists()


def make_tokens(folder: Path, name: str) -> None:
    draw = np.random.default_rng(0)
    (folder / "data" / name).mkdir(parents=True)
    for file, count in (("train.bin", 4000), ("val.bin", 800)):
        draw.integers(0, 50257, count).astype("<u2").tofile(folder / "data" / name / file)


def test_nanogpts_commands_train(tmp_path):
    make_tokens(tmp_path, "austen")
    make_tokens(tmp_path, "openwebtext")
    tiny = ["n_layer=1", "n_head=1", "n_embd=8", "block_size=8", "max_iters=2", "batch_size=2",
            "gradient_accumulation_steps=2", "eval_iters=1", "compile=False",
            "dtype=float32"]  # fmt: skip
    for number, command in enumerate(COMMANDS["003"]):
        out = tmp_path / f"out{number}"
        run(command, *tiny, f"out_dir={out}", cwd=tmp_path)
        assert (out / "ckpt.pt").exists()
    assert list((tmp_path / "wandb").glob("offline-run-*"))


@pytest.mark.parametrize("number", [0, 2])
def test_nanogpts_commands_dry(tmp_path, number):
    """The whole size, with neither data nor GPU."""
    done = run(COMMANDS["003"][number], "--dry_run", cwd=tmp_path)
    width, layers = (384, 6) if number == 2 else (768, 12)
    tables, norms = (50304 + 1024) * width, (2 * layers + 1) * width
    assert parameters(done) == tables + norms + layers * 12 * width**2
    assert "no CUDA device here" in done.stderr or "device: auto" in done.stdout


def test_gpt3_commands_dry():
    basic, launched, deepspeed, *_ = COMMANDS["002"]
    done = run(basic, "--dry_run")
    assert 1.3e9 < parameters(done) < 1.35e9
    done = run(launched, "--dry_run")
    assert done.stdout.count("parameters: ") == 1, "one of the four processes talks"
    assert "x 4 devices" in done.stdout and 6.6e9 < parameters(done) < 6.9e9
    done = run(deepspeed, "--dry_run")
    assert 12.5e9 < parameters(done) < 13.1e9


def test_gpt3_commands_train(tmp_path):
    """A small model through the launcher, its events read by TensorBoard, and resumed."""
    _, launched, _, tensorboard, resume = COMMANDS["002"]
    write_text(tmp_path / "train.txt")
    model = "{n_layers: 1, d_model: 16, n_heads: 2, context_length: 16, vocab_size: 257}"
    (tmp_path / "tiny.yaml").write_text(model)
    (tmp_path / "training.yaml").write_text(
        f"data: {{train_urls: [{tmp_path}/train.txt], tokenizer: bytes, cache_dir: cache}}\n"
        "experiment_name: experiment_name\nmax_steps: 4\nbatch_size: 8\nsave_interval: 2\n"
    )
    small = launched.replace("configs/model_configs/6.7B.yaml", "tiny.yaml").replace(
        "configs/training_configs/large_scale.yaml", "training.yaml"
    )
    run(small, "--fp16", "--gradient_checkpointing", "--seed", "5", cwd=tmp_path)
    folder = tmp_path / "experiments" / "experiment_name"
    assert (folder / "logs" / "training.log").read_text()
    step, latest = (folder / "checkpoints" / n for n in ("step_3.pt", "latest_checkpoint.pt"))
    assert step.samefile(latest)
    shown = run(tensorboard, "--inspect", cwd=tmp_path).stdout
    assert "train/loss" in shown
    plain = small[small.index("src/train.py") :]
    more = ["--fp16", "--trainer.num_train_steps", "6"]
    done = run(f"python3 {plain} {resume}", *more, cwd=tmp_path)
    assert "Trained 2 steps" in done.stdout
    lines = (folder / "logs" / "metrics.jsonl").read_text().splitlines()
    assert max(json.loads(line).get("step", 0) for line in lines) == 5


def test_what_this_machine_lacks_is_one_line():
    basic = COMMANDS["002"][0]
    words = ["--distributed_backend", "nccl", "--num_nodes", "2", "--gpus_per_node", "4"]
    import torch

    if torch.cuda.is_available():
        pytest.skip("the messages are those without CUDA")
    error = run(basic, *words, code=2).stderr.strip().splitlines()[-1]
    assert "distributed_backend = nccl" in error and "use gloo" in error
    words[1] = "gloo"
    error = run(basic, *words, code=2).stderr
    assert "MASTER_ADDR=<address of machine 0> NODE_RANK=1" in error
    assert "train.bin" in run(basic, code=2).stderr
