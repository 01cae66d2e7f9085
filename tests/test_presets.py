"""The shipped files of the other command lines parse and have exactly the documented keys."""

import json
from pathlib import Path

import pytest
import yaml

from ostro.config import load
from ostro.data.sources.source import TokensSource
from ostro.lm_config import TrainLmConfig

ROOT = Path(__file__).parents[1]

# Name: layers, width, heads, learning rate, batch in tokens (Table 2.1 of arXiv:2005.14165).
PAPER = {
    "125M": (12, 768, 12, 6.0e-4, 0.5e6),
    "350M": (24, 1024, 16, 3.0e-4, 0.5e6),
    "760M": (24, 1536, 16, 2.5e-4, 0.5e6),
    "1.3B": (24, 2048, 16, 2.0e-4, 1e6),
    "2.7B": (32, 2560, 32, 1.6e-4, 1e6),
    "6.7B": (32, 4096, 32, 1.2e-4, 2e6),
    "13B": (40, 5120, 40, 1.0e-4, 2e6),
    "175B": (96, 12288, 96, 0.6e-4, 3.2e6),
}
TRAINING = {
    "data": ["source", "tokenizer"],
    "experiment_name": None,
    "seed": None,
    "max_steps": None,
    "eval_interval": None,
    "log_interval": None,
    "save_interval": None,
    "keep_interval": None,
    "learning_rate": None,
    "batch_size": None,
    "sequence_length": None,
    "optimizer": ["type", "betas", "eps", "weight_decay"],
    "scheduler": ["type", "warmup_steps", "T_max", "eta_min"],
    "dropout": None,
    "gradient_clipping": None,
    "fp16": None,
    "gradient_checkpointing": None,
    "logging": ["level"],
}
NANOGPT = {
    "out_dir": "out", "log_interval": 1, "eval_interval": 2000, "eval_iters": 200,
    "eval_only": False, "always_save_checkpoint": True, "init_from": "scratch",
    "wandb_log": False, "wandb_project": "austen-gpt", "wandb_run_name": "gpt2-austen-12layer",
    "dataset": "austen", "batch_size": 12, "block_size": 1024, "gradient_accumulation_steps": 40,
    "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95,
    "grad_clip": 1.0, "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000,
    "min_lr": 6e-5, "backend": "nccl", "device": "cuda", "dtype": "bfloat16", "compile": True,
}  # fmt: skip


def read(path):
    return yaml.safe_load((ROOT / path).read_text())


def test_there_is_a_file_for_every_model_of_the_paper():
    assert {path.stem for path in (ROOT / "configs/model_configs").iterdir()} == set(PAPER)


@pytest.mark.parametrize("name", PAPER)
def test_models_are_those_of_the_paper(name):
    layers, width, heads, learning_rate, batch_tokens = PAPER[name]
    model = read(f"configs/model_configs/{name}.yaml")
    batch = model.pop("batch_size")
    assert abs(batch * 2048 / batch_tokens - 1) < 0.05
    assert model == {
        "n_layers": layers,
        "d_model": width,
        "n_heads": heads,
        "context_length": 2048,
        "vocab_size": 50257,
        "learning_rate": learning_rate,
        "training_tokens": 300e9,
        "warmup_tokens": 375e6,
    }
    assert width % heads == 0
    parameters = 12 * layers * width**2 + (50257 + 2048) * width
    said = float(name[:-1]) * {"M": 1e6, "B": 1e9}[name[-1]]
    assert abs(parameters / said - 1) < 0.03


@pytest.mark.parametrize("name", ["small_scale", "large_scale"])
def test_training_files_have_the_documented_keys(name, tmp_path):
    training = read(f"configs/training_configs/{name}.yaml")
    keys = {key: list(value) if isinstance(value, dict) else None
            for key, value in training.items()}  # fmt: skip
    assert keys == TRAINING
    assert training["learning_rate"] is None and training["scheduler"]["T_max"] is None
    assert training["optimizer"] == {
        "type": "AdamW",
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump({"data": training["data"]}))
    config = load(TrainLmConfig, [str(path)]).config
    assert config.data.source == TokensSource(dir="data/processed")


def test_deepspeed_leaves_every_value_to_the_other_files():
    config = json.loads((ROOT / "configs/deepspeed_config.json").read_text())
    assert config.pop("zero_optimization") == {"stage": 2}
    assert config.pop("steps_per_print") > 100_000
    assert config["optimizer"].pop("type") == "AdamW"
    leaves = [value for value in config.values() if not isinstance(value, dict)]
    leaves += (
        config["fp16"].values(),
        config["bf16"].values(),
        config["optimizer"]["params"].values(),
    )
    assert all(leaf == "auto" or set(leaf) == {"auto"} for leaf in leaves)
    assert "scheduler" not in config


def test_train_config_has_the_documented_defaults():
    config = read("train_config.yaml")
    assert config == NANOGPT and len(config) == 33
    assert list(map(type, config.values())) == list(map(type, NANOGPT.values()))


@pytest.mark.parametrize(
    "path",
    ["train_config.yaml", *(f"configs/model_configs/{name}.yaml" for name in PAPER),
     "configs/training_configs/small_scale.yaml", "configs/training_configs/large_scale.yaml"],
)  # fmt: skip
def test_every_key_is_explained(path):
    for line in (ROOT / path).read_text().splitlines():
        key, _, rest = line.partition(":")
        if line.lstrip().startswith("#") or not rest.strip() or "type" in key:
            continue
        assert "  # " in rest, line
