"""`python train.py key=value`: nanoGPT's settings, files and checkpoints."""

import contextlib
import io
import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from nanogpt_reference import Gpt
from tiny_run import torchrun_words, write_text

from ostro.checkpoint import find_latest
from ostro.cli import nanogpt
from ostro.cli.nanogpt import load_nanogpt
from ostro.cli.native import saved_config
from ostro.compat.nanogpt.settings import NanoGptConfig, names
from ostro.core.errors import CheckpointError, ConfigError
from ostro.optim import MuonConfig
from ostro.runtime.entry_point import entry_point
from ostro.runtime.signals import Interrupted, Signals
from ostro.train_lm import load_model, load_tokenizer, run

ROOT = Path(__file__).parents[2]
SMALL = [
    *("n_layer=2", "n_head=2", "n_embd=16", "block_size=16", "batch_size=4", "dataset=tiny"),
    *("gradient_accumulation_steps=2", "max_iters=8", "eval_interval=4", "eval_iters=2"),
    *("warmup_iters=2", "lr_decay_iters=8", "learning_rate=1e-2", "min_lr=1e-3"),
    *("compile=False", "dtype=float32"),
]


def make_data(folder: Path) -> None:
    """A data set of characters, as nanoGPT's preparation leaves it."""
    text = write_text(folder / "text.txt", 3000).read_text()
    chars = sorted(set(text))
    ids = np.array([chars.index(char) for char in text], dtype="<u2")
    data = folder / "data" / "tiny"
    data.mkdir(parents=True)
    ids[:12000].tofile(data / "train.bin")
    ids[12000:].tofile(data / "val.bin")
    itos = dict(enumerate(chars))
    meta = {"vocab_size": len(chars), "itos": itos, "stoi": {c: i for i, c in itos.items()}}
    (data / "meta.json").write_text(json.dumps(meta))


class Done(NamedTuple):
    stdout: str
    stderr: str


def train(folder: Path, *words: str, code: int = 0) -> Done:
    """What `python train.py` does in a folder, within this process."""
    out, errors = io.StringIO(), io.StringIO()
    redirected = contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors)
    with contextlib.chdir(folder), redirected[0], redirected[1]:
        found = entry_point(lambda signals: nanogpt.train(list(words), signals))
    done = Done(out.getvalue(), errors.getvalue())
    assert found == code, done.stdout + done.stderr
    return done


def losses(folder: Path, out: str = "out") -> dict[int, float]:
    lines = (folder / out / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return {event["step"]: event["train/loss"] for event in events if "train/loss" in event}


def read(folder: Path, out: str = "out") -> dict:
    return torch.load(folder / out / "ckpt.pt", weights_only=True)


def reference(content: dict) -> Gpt:
    model = Gpt(**content["model_args"])
    model.load_state_dict(content["model"], strict=True)
    return model


def our_logits(path: Path, tokens: torch.Tensor) -> torch.Tensor:
    saved = find_latest(str(path))
    config, tokenizer = saved_config(saved, None), load_tokenizer(saved)
    with torch.no_grad():
        return load_model(saved, config, tokenizer, torch.device("cpu"))(tokens)


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nanogpt")
    make_data(folder)
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *SMALL, "bias=True"],
        cwd=folder, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0 and "saved out/ckpt.pt" in done.stdout, done.stderr
    return folder


def test_keys_types_and_defaults_are_the_documented_ones():
    documented = {
        "out_dir": "out", "log_interval": 1, "eval_interval": 2000, "eval_iters": 200,
        "eval_only": False, "always_save_checkpoint": True, "init_from": "scratch",
        "wandb_log": False, "wandb_project": "austen-gpt",
        "wandb_run_name": "gpt2-austen-12layer", "dataset": "austen", "batch_size": 12,
        "block_size": 1024, "gradient_accumulation_steps": 40, "n_layer": 12, "n_head": 12,
        "n_embd": 768, "dropout": 0.0, "bias": False, "learning_rate": 6e-4,
        "max_iters": 600000, "weight_decay": 1e-1, "beta1": 0.9, "beta2": 0.95,
        "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000,
        "min_lr": 6e-5, "backend": "nccl", "device": "cuda", "dtype": "bfloat16",
        "compile": True,
    }  # fmt: skip
    assert len(documented) == 33
    defaults = {name: getattr(NanoGptConfig(), name) for name in names() if name != "seed"}
    assert defaults == documented
    assert {n: type(v) for n, v in defaults.items()} == {n: type(v) for n, v in documented.items()}


def test_the_shipped_file_holds_the_defaults(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    shipped, made = load_nanogpt([])
    monkeypatch.chdir(tmp_path)
    bare, _ = load_nanogpt([])
    assert made.loaded.config == NanoGptConfig()
    assert shipped.config == bare.config


def test_nanogpt_reads_our_checkpoint(trained):
    content = read(trained)
    assert set(content) == {
        "model", "optimizer", "model_args", "iter_num", "best_val_loss", "config", "ostro"
    }  # fmt: skip
    assert set(content["model_args"]) == {
        "n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"
    }  # fmt: skip
    assert content["iter_num"] == 8
    assert {k: content["config"][k] for k in ("dataset", "batch_size", "learning_rate")} == {
        "dataset": "tiny", "batch_size": 4, "learning_rate": 1e-2
    }  # fmt: skip
    given = dict(word.split("=") for word in SMALL)
    for key, value in given.items():
        assert str(content["config"][key]) in (value, str(float(value) if "e-" in value else value))
    model = reference(content)
    tokens = torch.randint(content["model_args"]["vocab_size"], (3, 16))
    with torch.no_grad():
        torch.testing.assert_close(
            model(tokens), our_logits(trained / "out", tokens), rtol=0, atol=1e-5
        )


def test_our_moments_are_those_of_their_optimizer(trained):
    """Loaded into torch.optim.AdamW, each moment belongs to its parameter: shapes and a step."""
    content = read(trained)
    model = reference(content)
    optimizer = model.optimizer(lr=1e-3)
    optimizer.load_state_dict(content["optimizer"])
    by_name = {name: optimizer.state[p] for name, p in model.named_parameters()}
    assert all(int(state["step"]) == 8 for state in by_name.values())
    for name, p in model.named_parameters():
        assert by_name[name]["exp_avg"].shape == p.shape
    # The moment of qkv is reordered as the weight is: what our file says of one head of the
    # queries is what the reference has in those rows.
    ours = content["ostro"]
    saved = find_latest(str(trained / "out"))
    moments = saved.tensors("optimizer")["blocks.0.attention.qkv.weight.exp_avg"]
    theirs = by_name["transformer.h.0.attn.c_attn.weight"]["exp_avg"]
    assert torch.equal(theirs[:8], moments[:8])  # queries of the first head
    assert torch.equal(theirs[16:24], moments[8:16])  # keys of the first head
    assert torch.equal(theirs[8:16], moments[24:32])  # queries of the second
    assert "config.yaml" in ours["texts"]


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_we_go_on_from_their_checkpoint(tmp_path, monkeypatch, prefix):
    make_data(tmp_path)
    vocab = json.loads((tmp_path / "data/tiny/meta.json").read_text())["vocab_size"]
    args = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "bias": False,
            "vocab_size": vocab, "dropout": 0.0}  # fmt: skip
    torch.manual_seed(0)
    model = Gpt(**args)
    optimizer = model.optimizer(lr=1e-2, betas=(0.9, 0.95))
    tokens = torch.randint(vocab, (4, 17))
    for _ in range(3):
        logits = model(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    config = {"dataset": "tiny", "batch_size": 4, "learning_rate": 1e-2, "out_dir": "out",
              "dtype": "float32"}  # fmt: skip
    content = {
        "model": {prefix + name: value for name, value in model.state_dict().items()},
        "optimizer": optimizer.state_dict(), "model_args": args, "iter_num": 3,
        "best_val_loss": torch.tensor(2.5), "config": config,
    }  # fmt: skip
    (tmp_path / "out").mkdir()
    torch.save(content, tmp_path / "out" / "ckpt.pt")

    inputs = torch.randint(vocab, (2, 16))
    with torch.no_grad():
        logits = model(inputs)
    monkeypatch.chdir(tmp_path)
    ours = our_logits(tmp_path / "out" / "ckpt.pt", inputs)
    torch.testing.assert_close(ours, logits, rtol=0, atol=1e-5)
    done = train(tmp_path, *(w for w in SMALL if "max_iters" not in w), "max_iters=5",
                 "init_from=resume")  # fmt: skip
    assert "random state" in done.stdout, "what such a file cannot restore is said"
    assert sorted(losses(tmp_path)) == [3, 4]
    again = read(tmp_path)
    assert again["iter_num"] == 5
    reference(again)


def test_resume_is_exact(tmp_path):
    make_data(tmp_path)
    words = [*SMALL, "dropout=0.1"]
    train(tmp_path, *words, "out_dir=whole")
    train(tmp_path, *words, "out_dir=halves", "max_iters=4")
    train(tmp_path, *words, "out_dir=halves", "init_from=resume")
    assert losses(tmp_path, "whole") == losses(tmp_path, "halves")
    whole, halves = read(tmp_path, "whole"), read(tmp_path, "halves")
    for name, value in whole["model"].items():
        assert torch.equal(value, halves["model"][name])
    assert whole["best_val_loss"] == halves["best_val_loss"]


def test_every_setting_but_the_architecture_may_change_at_a_resume(tmp_path):
    make_data(tmp_path)
    train(tmp_path, *SMALL)
    shutil.copytree(tmp_path / "data" / "tiny", tmp_path / "data" / "other")
    data = np.fromfile(tmp_path / "data" / "other" / "train.bin", dtype="<u2")
    data[::-1].tofile(tmp_path / "data" / "other" / "train.bin")
    changed = ["learning_rate=5e-3", "min_lr=1e-3", "beta2=0.99", "weight_decay=0.2",
               "grad_clip=0.5", "dropout=0.1", "batch_size=2", "gradient_accumulation_steps=1",
               "max_iters=10", "lr_decay_iters=10", "warmup_iters=1", "dataset=other",
               "dtype=bfloat16", "seed=5", "eval_interval=5"]  # fmt: skip
    out = train(tmp_path, *SMALL, *changed, "init_from=resume").stdout
    assert "learning_rate: was 0.01, now 0.005 (--learning_rate)" in out
    assert "warning: made_by.data.train: was " in out and " - refuse - " not in out
    assert sorted(losses(tmp_path)) == list(range(10))


def test_learning_rate_is_nanogpts(trained):
    lines = (trained / "out" / "metrics.jsonl").read_text().splitlines()
    rates = {e["step"]: e["optim/learning_rate"] for e in map(json.loads, lines)
             if "optim/learning_rate" in e}  # fmt: skip
    for step, rate in rates.items():
        if step < 2:
            expected = 1e-2 * (step + 1) / 3
        else:
            share = (step - 2) / (8 - 2)
            expected = 1e-3 + 0.5 * (1 + math.cos(math.pi * share)) * (1e-2 - 1e-3)
        assert rate == pytest.approx(expected, rel=1e-12)


def test_evaluations_come_before_updates_and_at_the_end(trained):
    lines = (trained / "out" / "metrics.jsonl").read_text().splitlines()
    events = [e for e in map(json.loads, lines) if "eval/loss" in e]
    assert [e["step"] for e in events] == [0, 4, 8]
    assert all("eval/train/loss" in e for e in events)
    assert events[0]["eval/loss"] == pytest.approx(math.log(read(trained)["model_args"]
                                                             ["vocab_size"]), abs=0.2)  # fmt: skip


def test_the_log_has_the_lines_of_nanogpt(trained):
    """One for each multiple of log_interval, and one for each evaluation."""
    lines = (trained / "out" / "train.log").read_text().splitlines()
    found = [line.partition(" ostro: ")[2] for line in lines]
    steps = [
        re.fullmatch(r"iter (\d+): loss \d+\.\d{4}, time \d+\.\d\dms, mfu .*%", line)
        for line in found
    ]
    assert [int(step[1]) for step in steps if step] == list(range(8))
    assert [line.split(":")[0] for line in found if line.startswith("step ")] == [
        "step 0",
        "step 4",
        "step 8",
    ]


def test_eval_only_writes_no_checkpoint(tmp_path):
    make_data(tmp_path)
    done = train(tmp_path, *SMALL, "eval_only=True")
    assert re.search(r"^step 0: train loss \d+\.\d{4}, val loss \d+\.\d{4}$", done.stdout, re.M)
    assert not (tmp_path / "out" / "ckpt.pt").exists()
    assert not losses(tmp_path)


def test_only_improvements_are_saved(tmp_path):
    """A learning rate that spoils the model: the file keeps the weights from before."""
    make_data(tmp_path)
    words = [w for w in SMALL if not w.startswith(("learning_rate", "eval_interval", "min_lr"))]
    words += ["always_save_checkpoint=False", "eval_interval=2", "learning_rate=1", "min_lr=1",
              "grad_clip=0", "weight_decay=0"]  # fmt: skip
    train(tmp_path, *words)
    lines = map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines())
    found = {e["step"]: e["eval/loss"] for e in lines if "eval/loss" in e}
    best = min(found, key=found.__getitem__)
    path = tmp_path / "out" / "ckpt.pt"
    assert (best == 0 and not path.exists()) or read(tmp_path)["iter_num"] == best


def test_a_python_file_is_read_and_not_run(tmp_path):
    make_data(tmp_path)
    config = tmp_path / "small.py"
    config.write_text('"""Settings."""\nbatch_size = 4\ngradient_accumulation_steps = 5 * 8\n'
                      "min_lr = 1e-4 / 10  # comment\nout_dir = 'from-py'\n")  # fmt: skip
    loaded, made = load_nanogpt([str(config), "batch_size=2"])
    assert made.loaded.config.gradient_accumulation_steps == 40
    assert made.loaded.config.min_lr == 1e-5
    assert loaded.config.trainer.train_batch_size == 80
    assert made.loaded.origins["out_dir"] == f"{config}:5"
    config.write_text("import os\nos.system('touch /tmp/never')\n")
    with pytest.raises(ConfigError, match=r"small\.py:1.*nothing is executed"):
        load_nanogpt([str(config)])
    config.write_text("batch_size = len('four')\n")
    with pytest.raises(ConfigError, match=r"batch_size = len\('four'\).*small\.py:1"):
        load_nanogpt([str(config)])


def test_a_python_file_that_is_not_there(tmp_path, monkeypatch):
    """The nearest name is suggested; the repository of the script counts, as for YAML."""
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "train_small.py").write_text("batch_size = 3\n")
    monkeypatch.chdir(tmp_path)
    says = r"config/trian_small\.py - no such file.* did you mean config/train_small\.py\?"
    with pytest.raises(ConfigError, match=says):
        load_nanogpt(["config/trian_small.py"])
    with pytest.raises(ConfigError, match=r"nowhere/x\.py - no such file; looked for nowhere/x"):
        load_nanogpt(["nowhere/x.py"])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    monkeypatch.setattr(nanogpt, "script_folders", lambda: [tmp_path])
    _, made = load_nanogpt(["config/train_small.py"])
    assert made.loaded.config.batch_size == 3


def test_a_learning_rate_below_the_default_of_min_lr():
    loaded, made = load_nanogpt(["learning_rate=1e-5"])
    assert loaded.config.optimizer.min_lr_ratio == 0.1
    rates = loaded.config.optimizer.schedule(600_000)
    assert rates(600_000) == pytest.approx(1e-6)
    notice = next(line for line in made.notices if "min_lr" in line)
    assert "min_lr = 6e-05" in notice and "learning_rate = 1e-05 (--learning_rate)" in notice
    _, made = load_nanogpt(["learning_rate=1e-3"])
    assert not any("min_lr" in line for line in made.notices)
    loaded, _ = load_nanogpt(["learning_rate=0", "min_lr=0"])
    assert loaded.config.optimizer.schedule(9)(5) == 0


def test_effective_batch_counts_the_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    loaded, _ = load_nanogpt(["batch_size=3", "gradient_accumulation_steps=5"])
    assert loaded.config.trainer.train_batch_size == 30
    assert loaded.config.trainer.batch_plan(2).num_micro_batches(0) == 5


@pytest.mark.parametrize(
    "words", [["optimizer.type=muon"], ["--optimizer.type=muon"], ["--optimizer.type", "muon"]]
)
def test_the_settings_of_adamw_hold_for_muon_too(words):
    ours = ["learning_rate=1e-2", "min_lr=1e-3", "beta2=0.99", "weight_decay=0.2"]
    loaded, _ = load_nanogpt([*ours, *words, "--trainer.checkpointer.format=file"])
    adam = load_nanogpt(ours)[0].config.optimizer
    assert loaded.config.optimizer == MuonConfig(**vars(adam))
    assert (loaded.config.optimizer.min_lr_ratio, loaded.config.optimizer.beta2) == (0.1, 0.99)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["n_layr=3"], ["n_layr", "did you mean n_layer?"]),
        (["n_embd=100", "n_head=12"], ["n_embd = 100 (--n_embd)", "divisible by n_head = 12"]),
        (["device=cuda", "backend=nccl"], ["device = cuda", "backend = nccl", "device=cpu"]),
        (["bach_size"], ["neither key=value", "did you mean batch_size?"]),
        (["init_from=gpt3"], ["init_from = gpt3", "gpt2-xl"]),
        (["batch_size=many"], ["batch_size = many"]),
        (
            ["learning_rate=1e-5", "min_lr=6e-5"],
            ["min_lr = 6e-05 (--min_lr)", "above learning_rate = 1e-05 (--learning_rate)"],
        ),
        (["min_lr=-1"], ["min_lr = -1"]),
        (["seed=-1"], ["seed = -1 (--seed)", "between 0 and 2**64 - 1"]),
        (["seed=18446744073709551616"], ["seed = 18446744073709551616", "2**64 - 1"]),
        (["--data_seed", "-1"], ["data_seed = -1 (--data_seed)"]),
        (["--sampling.seed=-7"], ["sampling.seed = -7"]),
        (["init_from=resume", "out_dir=/nowhere"], ["there is no /nowhere/ckpt.pt"]),
        (["--trainer.seeed=1"], ["trainer.seeed = 1", "did you mean seed?"]),
        (["optimizer.type=muon"], ["optimizer.type", "ckpt.pt", "trainer.checkpointer.format"]),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="the messages are those without CUDA")
def test_mistakes_are_named(words, parts):
    with pytest.raises((ConfigError, CheckpointError)) as caught:
        load_nanogpt(words)
    for part in parts:
        assert part in str(caught.value)


def test_architecture_comes_from_the_checkpoint(trained, monkeypatch):
    monkeypatch.chdir(trained)
    loaded, _ = load_nanogpt(["init_from=resume", "dataset=tiny", "max_iters=9"])
    assert loaded.config.model.num_layers == 2
    assert loaded.config.trainer.num_train_steps == 9
    with pytest.raises(ConfigError, match=r"n_layer = 3 \(--n_layer\).*has n_layer = 2"):
        load_nanogpt(["init_from=resume", "dataset=tiny", "n_layer=3"])


def test_bad_data_and_checkpoints_are_one_message(tmp_path):
    make_data(tmp_path)
    data = tmp_path / "data" / "tiny"
    (data / "prepare.py").write_text("")
    train_bin = (data / "train.bin").read_bytes()
    (data / "train.bin").unlink()
    assert "python data/tiny/prepare.py" in train(tmp_path, *SMALL, code=2).stderr
    (data / "train.bin").write_bytes(train_bin + b"x")
    assert "train.bin" in train(tmp_path, *SMALL, code=2).stderr
    (data / "train.bin").write_bytes(b"")
    assert "is empty" in train(tmp_path, *SMALL, code=2).stderr
    (data / "train.bin").write_bytes(train_bin[:2000] + b"\xff\xff" + train_bin[2000:])
    assert "id 65535 at token 1000" in train(tmp_path, *SMALL, code=2).stderr
    (data / "train.bin").write_bytes(train_bin)
    (tmp_path / "out").mkdir(exist_ok=True)
    torch.save({"model_args": Path("x")}, tmp_path / "out" / "ckpt.pt")
    done = train(tmp_path, *SMALL, "init_from=resume", code=2)
    assert "they can run code" in done.stderr
    (tmp_path / "out" / "ckpt.pt").write_bytes(b"PK\x03\x04 torn")
    assert "ckpt.pt" in train(tmp_path, *SMALL, "init_from=resume", code=2).stderr


@pytest.mark.dist
def test_two_processes_give_the_losses_of_one(tmp_path):
    """The same effective batch: half the accumulation on each of two processes."""
    make_data(tmp_path)
    words = [word for word in SMALL if "accumulation" not in word]
    train(tmp_path, *words, "gradient_accumulation_steps=4", "out_dir=one")
    more = ["gradient_accumulation_steps=2", "out_dir=two", "device=cpu", "backend=gloo"]
    command = torchrun_words(2, ROOT / "train.py", *words, *more)
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)
    assert read(tmp_path, "two")["config"]["gradient_accumulation_steps"] == 2


def test_starting_from_hugging_face_weights(tmp_path):
    """A folder of transformers: its sizes, its weights, a shorter context."""
    from transformers import GPT2Config, GPT2LMHeadModel

    make_data(tmp_path)
    vocab = json.loads((tmp_path / "data/tiny/meta.json").read_text())["vocab_size"]
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "n_positions": 32}
    torch.manual_seed(1)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocab, **sizes)).eval()
    model.save_pretrained(tmp_path / "hf")
    words = [w for w in SMALL if not w.startswith(("n_", "learning_rate", "min_lr", "max_iters"))]
    words += ["init_from=hf", "learning_rate=0", "decay_lr=False", "max_iters=1"]
    done = train(tmp_path, *words)
    assert "starting from the weights of hf" in done.stdout
    tokens = torch.randint(vocab, (2, 16))
    with torch.no_grad():
        expected = model(tokens).logits
    ours = our_logits(tmp_path / "out", tokens)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    error = train(tmp_path, *words, "n_layer=3", code=2).stderr
    assert "n_layer = 3" in error and "init_from = hf has n_layer = 2" in error


def test_without_a_compiler_it_runs_eager(tmp_path, monkeypatch):
    make_data(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    done = train(tmp_path, *SMALL, "compile=True", "max_iters=1")
    assert done.stdout.count("no C++ compiler here") == 1


def test_an_interrupted_run_leaves_the_best_weights_alone(tmp_path):
    """The state of a stopped run lies beside `ckpt.pt`, and is what a resumed run goes on from."""
    make_data(tmp_path)
    words = [*SMALL, "always_save_checkpoint=False"]

    def stop(signals: Signals) -> None:
        loaded, _ = load_nanogpt([*words, "--trainer.progress=false"])

        class Stopping(Signals):
            polls = 0

            @property
            def received(self) -> bool:
                self.polls += 1
                return self.polls == 20

        run(loaded.config, Stopping())

    with contextlib.chdir(tmp_path):
        with pytest.raises(Interrupted):
            stop(Signals())
        assert Path("out/ckpt_interrupted.pt").exists()
        stopped = torch.load("out/ckpt_interrupted.pt", weights_only=True)["iter_num"]
    assert 4 < stopped < 8
    (tmp_path / "out" / "ckpt.pt").unlink()  # as if nothing had been an improvement yet
    done = train(tmp_path, *words, "init_from=resume")
    assert f"Trained {8 - stopped} steps" in done.stdout


def test_a_folder_called_scratch_means_nothing(tmp_path, monkeypatch):
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_nanogpt([])[0].config
    assert config.model.activation_function == "gelu" and config.initialize_from_hf is None


def test_sample_script(trained):
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "num_samples=2", "--sampling.max_new_tokens=5",
         "start=fox"],
        cwd=trained, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("---------------") == 2 and done.stdout.startswith("fox")
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "num_sample=2"],
        cwd=trained, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "did you mean num_samples?" in done.stderr


def test_weights_without_an_optimizer_sample_and_do_not_resume(trained, tmp_path):
    content = torch.load(trained / "out" / "ckpt.pt", weights_only=True)
    make_data(tmp_path)
    (tmp_path / "out").mkdir()
    for key in ("optimizer", "iter_num", "best_val_loss"):
        del content[key]
    torch.save(content, tmp_path / "out" / "ckpt.pt")
    before = (tmp_path / "out" / "ckpt.pt").read_bytes()
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "num_samples=1", "max_new_tokens=5", "start=fox"],
        cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    refused = train(tmp_path, *SMALL, "init_from=resume", code=2).stderr
    assert "out/ckpt.pt - holds no optimizer state" in refused
    assert "--trainer.initialize_from out/ckpt.pt" in refused
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == before
    flags = refused.partition("from these weights alone, with ")[2].splitlines()[0].split()
    done = train(tmp_path, *SMALL, "init_from=resume", *flags)
    assert "initialising from the weights of out/ckpt.pt" in done.stdout


LIBRARY = """
import sys
from ostro.checkpoint import CheckpointerConfig
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer_config import BytesTokenizer
from ostro.lm_config import TrainLmConfig
from ostro.models import Gpt2Config
from ostro.tracker import NoopConfig
from ostro.train_lm import run
from ostro.trainer import TrainerConfig

saving = CheckpointerConfig("saved/.", format="nanogpt")
run(TrainLmConfig(
    data=LMDatasetConfig(tokenizer=BytesTokenizer(), train_urls=["train.txt"]),
    model=Gpt2Config(seq_len=16, hidden_dim=16, num_layers=1, num_heads=2),
    trainer=TrainerConfig(
        num_train_steps=2, train_batch_size=2, steps_per_eval=None, id="a", device="cpu",
        checkpointer=saving, tracker=NoopConfig(),
    ),
))
assert not any(name.startswith("ostro.cli") for name in sys.modules)
"""


def test_the_format_needs_no_command_line(tmp_path):
    write_text(tmp_path / "train.txt")
    words = [sys.executable, "-c", LIBRARY]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert torch.load(tmp_path / "saved" / "ckpt.pt", weights_only=True)["iter_num"] == 2
