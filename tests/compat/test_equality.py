"""One run written by hand in the three dialects: equal configurations, bit-equal losses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_nanogpt import make_data

from ostro.cli.arguments import load_run
from ostro.cli.gpt3 import load_gpt3
from ostro.cli.main import run_command
from ostro.cli.nanogpt import load_nanogpt

ROOT = Path(__file__).parents[2]

TRACKERS = "[{type: json_logger}, {type: console, style: nanogpt, log_every: 1}]"  # nanoGPT's
NATIVE = """
data:
  source: {type: tokens, dir: data/tiny}
  tokenizer: {type: meta, path: data/tiny}
  sampling: windows
  evaluate_train: true
trainer:
  seed: 7
  num_train_steps: 20
  train_batch_size: 8
  per_device_parallelism: 4
  per_device_eval_parallelism: 4
  steps_per_eval: 10
  eval_when: before
  fsdp_axis: null
  max_eval_batches: 2
  log_interval: 1
  mp: f32
  log_dir: out/.
  tracker: TRACKERS
  checkpointer: {base_path: out/., format: nanogpt, save_interval: null, keep: [],
                 save_after_eval: always, save_last: false}
  load_checkpoint: false
model:
  type: gpt2
  seq_len: 16
  hidden_dim: 16
  num_layers: 2
  num_heads: 2
  embed_pdrop: 0.1
  resid_pdrop: 0.1
  attn_pdrop: 0.1
  activation_function: gelu
  gradient_checkpointing: false
  use_bias: false
optimizer:
  learning_rate: 6e-3
  weight_decay: 0.1
  min_lr_ratio: 0.1
  warmup: 5
  warmup_offset: 1
  schedule_steps: 20
  beta1: 0.9
  beta2: 0.99
  max_grad_norm: 0.5
  decay_mask: all_2d
""".replace("TRACKERS", TRACKERS)

NANOGPT = [
    *("dataset=tiny", "n_layer=2", "n_head=2", "n_embd=16", "block_size=16", "dropout=0.1"),
    *("batch_size=4", "gradient_accumulation_steps=2", "max_iters=20", "lr_decay_iters=20"),
    *("warmup_iters=5", "learning_rate=6e-3", "min_lr=6e-4", "beta2=0.99", "grad_clip=0.5"),
    *("eval_interval=10", "eval_iters=2", "seed=7", "dtype=float32", "compile=False"),
]

GPT3_MODEL = "{n_layers: 2, d_model: 16, n_heads: 2, context_length: 16, batch_size: 8}"
GPT3_TRAINING = """
data:
  source: {type: tokens, dir: data/tiny}
  tokenizer: {type: meta, path: data/tiny}
  sampling: windows
  evaluate_train: true
seed: 7
max_steps: 20
eval_interval: 10
log_interval: 1
learning_rate: 6.0e-3
micro_batch_size: 4
optimizer: {type: AdamW, betas: [0.9, 0.99], eps: 1.0e-8, weight_decay: 0.1}
scheduler: {type: CosineAnnealingLR, warmup_steps: 5, T_max: 20, eta_min: 6.0e-4}
dropout: 0.1
gradient_clipping: 0.5
"""
# What the GPT-3 style files have no word for.
GPT3_MORE = [
    *("--trainer.eval_when=before", "--trainer.max_eval_batches=2", "--trainer.log_dir=out/."),
    *("--trainer.log_file=train.log", f"--trainer.tracker={TRACKERS}"),
    *("--trainer.checkpointer.base_path=out/.", "--trainer.checkpointer.format=nanogpt"),
    *("--trainer.checkpointer.keep=[]", "--trainer.checkpointer.save_after_eval=always"),
    *("--trainer.checkpointer.save_last=false", "--model.activation_function=gelu"),
    *("--model.use_bias=false", "--vocab_size=null", "--optimizer.warmup_offset=1"),
    "--optimizer.decay_mask=all_2d",
]


@pytest.fixture
def folders(tmp_path) -> dict[str, tuple[Path, list[str]]]:
    """A folder for each dialect with its files, and the command that trains there."""
    made = {}
    for name in ("native", "nanogpt", "gpt3"):
        folder = tmp_path / name
        folder.mkdir()
        make_data(folder)
        (folder / "run.yaml").write_text(NATIVE)
        (folder / "tiny.yaml").write_text(GPT3_MODEL)
        (folder / "training.yaml").write_text(GPT3_TRAINING)
        made[name] = folder
    gpt3 = ["--config", "tiny.yaml", "--training_config", "training.yaml", *GPT3_MORE]
    return {
        "native": (made["native"], ["-m", "ostro.cli.main", "train", "--config_path", "run.yaml"]),
        "nanogpt": (made["nanogpt"], [str(ROOT / "train.py"), *NANOGPT]),
        "gpt3": (made["gpt3"], [str(ROOT / "src" / "train.py"), *gpt3]),
    }


def test_three_dialects_one_run(folders, monkeypatch):
    monkeypatch.chdir(folders["native"][0])
    native = load_run("run.yaml", []).config
    assert load_nanogpt(NANOGPT)[0].config == native
    assert load_gpt3(folders["gpt3"][1][1:])[0].config == native
    found = {}
    for name, (folder, command) in folders.items():
        done = subprocess.run(
            [sys.executable, *command],
            cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        events = map(json.loads, (folder / "out" / "metrics.jsonl").read_text().splitlines())
        found[name] = [
            {key: event[key] for key in ("step", "train/loss", "eval/loss") if key in event}
            for event in events
            if "train/loss" in event or "eval/loss" in event
        ]
    assert len(found["native"]) == 20 + 3
    assert found["nanogpt"] == found["native"]
    assert found["gpt3"] == found["native"]


def test_translate_writes_a_file_that_loads_as_the_same_run(folders, monkeypatch, capsys):
    monkeypatch.chdir(folders["native"][0])
    words = {
        "nanogpt": ["nanogpt", "small.py"],
        "gpt3": ["gpt3", "tiny.yaml", "training.yaml"],
        "levanter": ["levanter", "run.yaml"],
    }
    lines = [word.replace("=", " = '" if word.startswith("dataset") else " = ", 1)
             + ("'" if word.startswith("dataset") else "") for word in NANOGPT]  # fmt: skip
    Path("small.py").write_text("\n".join(lines).replace("= float32", "= 'float32'"))
    expected = {
        "nanogpt": load_nanogpt(["small.py"])[0].config,
        "gpt3": load_gpt3(["--config", "tiny.yaml", "--training_config", "training.yaml"])[
            0
        ].config,
        "levanter": load_run("run.yaml", []).config,
    }
    for name, command in words.items():
        capsys.readouterr()
        assert run_command(["config", "translate", "--from", *command]) == 0
        shown = capsys.readouterr()
        Path(f"{name}.yaml").write_text(shown.out)
        assert load_run(f"{name}.yaml", []).config == expected[name]
        assert len(yaml.safe_load(shown.out)) >= 4
        if name == "nanogpt":
            assert "n_embd -> model.hidden_dim" in shown.err
        if name == "gpt3":
            assert "num_nodes: ignored" in shown.err


def test_translate_refuses_what_it_does_not_know(tmp_path, capsys):
    (tmp_path / "x.yaml").write_text("n_layer: 2\nflash: true\n")
    assert run_command(["config", "translate", "--from", "nanogpt", str(tmp_path / "x.yaml")]) == 2
    error = capsys.readouterr().err
    assert "refused" in error and "flash = true" in error and "x.yaml:2" in error
