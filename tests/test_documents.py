"""The configurations that people already have decode to what they mean."""

from pathlib import Path

import pytest

from ostro.cli.aliases import NATIVE
from ostro.config import load
from ostro.core.errors import ConfigError
from ostro.core.units import Precision
from ostro.lm_config import TrainLmConfig
from ostro.tracker import TensorboardConfig, WandbConfig

MY_RUN = """
data:
    train_urls:
      - "gs://my_bucket/openwebtext-sharded/openwebtext_train.{1..128}-of-128.jsonl.gz"
    validation_urls:
      - "gs://my_bucket/openwebtext-sharded/openwebtext_val.{1..8}-of-8.jsonl.gz"
    cache_dir: "gs://my_bucket/tokenized/openwebtext_2/"
model:
  type: gpt2
  hidden_dim: 768
  num_heads: 12
  num_layers: 12
  seq_len: 1024
  gradient_checkpointing: true
  scale_attn_by_inverse_layer_idx: true
trainer:
  tracker:
    type: wandb
    project: "levanter"
    tags: [ "openwebtext", "gpt2"]

  mp: p=f32,c=bfloat16
  model_axis_size: 1
  per_device_parallelism: 4

  train_batch_size: 512
optimizer:
  learning_rate: 6E-4
  weight_decay: 0.1
  min_lr_ratio: 0.1
"""

DATA = """
train_urls:
    - "gs://my_bucket/openwebtext-sharded/openwebtext_train.{1..128}-of-128.jsonl.gz"
validation_urls:
    -  "gs://my_bucket/openwebtext-sharded/openwebtext_val.{1..8}-of-8.jsonl.gz"
cache_dir: "gs://my_bucket/tokenized/openwebtext_2/"
"""


def read(folder: Path, text: str, *flags: str) -> TrainLmConfig:
    path = folder / "run.yaml"
    path.write_text(text)
    return load(TrainLmConfig, [str(path)], flags, aliases=NATIVE).config


def test_the_long_example(tmp_path):
    config = read(tmp_path, MY_RUN)
    assert config.data.cache_dir == "gs://my_bucket/tokenized/openwebtext_2/"
    assert config.data.train_urls == [
        "gs://my_bucket/openwebtext-sharded/openwebtext_train.{1..128}-of-128.jsonl.gz"
    ]
    model = config.model
    assert (model.hidden_dim, model.num_heads, model.num_layers) == (768, 12, 12)
    assert model.scale_attn_by_inverse_layer_idx and model.gradient_checkpointing
    assert config.trainer.tracker == WandbConfig(project="levanter", tags=["openwebtext", "gpt2"])
    assert config.trainer.mp == Precision("float32", "bfloat16", "bfloat16")
    plan = config.trainer.batch_plan(1)
    assert plan.num_micro_batches(0) == 128
    assert config.optimizer.learning_rate == 6e-4
    assert config.optimizer.weight_decay == 0.1


def test_include_is_the_block_it_stands_for(tmp_path):
    (tmp_path / "data.yaml").write_text(DATA)
    short = "data: !include data.yaml\ntrainer:\n    num_train_steps: 1000000\n"
    indented = "".join(f"    {line}\n" for line in DATA.strip().splitlines())
    long = f"data:\n{indented}trainer:\n    num_train_steps: 1000000\n"
    assert read(tmp_path, short) == read(tmp_path, long)
    assert read(tmp_path, short).trainer.num_train_steps == 1_000_000


def test_keep_saves_22_checkpoints_in_100_000_steps(tmp_path):
    config = read(
        tmp_path,
        """
trainer:
  checkpointer:
    keep:
      - every: 1000  # steps
        until: 10000 # step
      - every: 5000  # steps
        until: 40000 # step
      - every: 10000
""",
        "--data.source.type=stdlib",
    )
    steps = config.trainer.checkpointer.policy.permanent_steps(100_000)
    assert len(steps) == 22
    assert steps[:10] == list(range(1000, 10_001, 1000))
    assert steps[10:16] == list(range(15_000, 40_001, 5000))
    assert steps[16:] == list(range(50_000, 100_001, 10_000))


@pytest.mark.parametrize("first", ["type: wandb\n        ", ""], ids=["named", "default"])
def test_wandb_is_the_default_tracker(tmp_path, first):
    block = f"{first}project: my-project\n        entity: my-entity"
    config = read(tmp_path, f"data: {{source: stdlib}}\ntrainer:\n    tracker:\n        {block}\n")
    assert config.trainer.tracker == WandbConfig(project="my-project", entity="my-entity")


def test_tensorboard_and_several_trackers(tmp_path):
    one = "data: {source: stdlib}\ntrainer:\n  tracker:\n    type: tensorboard\n    logdir: logs\n"
    assert read(tmp_path, one).trainer.tracker == TensorboardConfig(logdir="logs")
    several = """
data: {source: stdlib}
trainer:
  tracker:
    - type: wandb
      project: my-project
      entity: my-entity
    - type: tensorboard
      logdir: logs
"""
    assert read(tmp_path, several).trainer.tracker == [
        WandbConfig(project="my-project", entity="my-entity"),
        TensorboardConfig(logdir="logs"),
    ]


def test_defaults_are_those_of_the_tables():
    config = TrainLmConfig()
    trainer, optimizer = config.trainer, config.optimizer
    assert (trainer.seed, trainer.num_train_steps, trainer.train_batch_size) == (0, 400_000, 32)
    assert (trainer.steps_per_eval, trainer.max_eval_batches) == (1000, None)
    assert str(trainer.mp) == "f32"
    assert trainer.log_dir == "logs/"
    assert (trainer.batch_axis, trainer.fsdp_axis) == ("batch", "embed")
    assert trainer.tensor_parallel_axes is None and trainer.model_axis_size == 1
    assert trainer.load_checkpoint is None and trainer.initialize_from is None
    checkpointer = trainer.checkpointer
    assert checkpointer.base_path == "checkpoints/${run_id}"
    assert checkpointer.save_interval.total_seconds() == 15 * 60
    assert [(k.every, k.until) for k in checkpointer.keep] == [(10_000, None)]
    assert trainer.tracker == WandbConfig(save_code=True, tags=[])
    distributed, ray = trainer.distributed, trainer.ray
    assert distributed.coordinator_address is None and distributed.num_processes is None
    assert (ray.address, ray.start_workers, ray.auto_start_cluster) == (None, True, True)
    assert (optimizer.weight_decay, optimizer.learning_rate) == (0.0, 1e-4)
    assert (optimizer.min_lr_ratio, optimizer.warmup, optimizer.decay) == (0.1, 0.01, None)
    assert (optimizer.rewarmup, optimizer.cycles, optimizer.cycle_length) == (0.0, None, None)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon) == (0.9, 0.95, 1e-8)
    assert optimizer.max_grad_norm == 1.0


FLAGS_2023 = [
    "--trainer.batch_size",
    "256",
    "--trainer.per_device_parallelism",
    "64",
    "--trainer.eval_per_device_parallelism",
    "64",
    "--trainer.wandb.project",
    "my_project",
    "--trainer.wandb.name",
    "my_run",
    "--trainer.wandb.id",
    "01234567",
    "--trainer.wandb.resume",
    "True",
    "--trainer.checkpointer.save_interval",
    "20m",
    "--trainer.learning_rate",
    "3E-4",
    "--trainer.load_checkpoint_path",
    "checkpoints/gpt2/wandb_run_name",
    "--trainer.warmup_ratio",
    "0.02",
]


def test_the_names_of_2023(tmp_path):
    config = read(tmp_path, MY_RUN, *FLAGS_2023)
    trainer = config.trainer
    assert trainer.train_batch_size == 256
    assert trainer.per_device_parallelism == trainer.per_device_eval_parallelism == 64
    assert trainer.batch_plan(1).num_micro_batches(0) == 4
    assert trainer.batch_plan(2).num_micro_batches(0) == 2
    assert trainer.batch_plan(4).num_micro_batches(0) == 1
    with pytest.raises(ConfigError, match=r"64 \* 8 = 512"):
        trainer.batch_plan(8)
    wandb = trainer.tracker
    assert (wandb.project, wandb.name, wandb.id, wandb.resume) == (
        *("my_project", "my_run", "01234567"),
        True,
    )
    assert wandb.tags == ["openwebtext", "gpt2"]
    assert trainer.checkpointer.save_interval.total_seconds() == 1200
    assert (config.optimizer.learning_rate, config.optimizer.warmup) == (3e-4, 0.02)


def test_a_comma_for_a_dot_is_pointed_out(tmp_path):
    with pytest.raises(ConfigError, match=r"trainer\.wandb\.group"):
        read(tmp_path, MY_RUN, "--trainer.wandb,group", "my_new_exp_group")


def test_a_flag_in_one_spelling_overrides_a_file_in_the_other(tmp_path):
    assert read(tmp_path, MY_RUN, "--trainer.batch_size", "128").trainer.train_batch_size == 128


def test_both_spellings_in_one_layer_are_an_error(tmp_path):
    flags = ("--trainer.batch_size", "128", "--trainer.train_batch_size", "64")
    with pytest.raises(ConfigError, match="train_batch_size"):
        read(tmp_path, MY_RUN, *flags)
