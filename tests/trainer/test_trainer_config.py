"""Batch arithmetic and the checks of the trainer's settings."""

import pytest

from ostro.checkpoint import CheckpointerConfig
from ostro.config import check
from ostro.core.errors import ConfigError
from ostro.trainer import BatchStage, TrainerConfig
from ostro.trainer.spikes import RecoverConfig, StepRange


@pytest.mark.parametrize(("devices", "micro_steps"), [(1, 4), (2, 2), (4, 1)])
def test_accumulation_fills_the_batch(devices, micro_steps):
    config = TrainerConfig(train_batch_size=256, per_device_parallelism=64)
    assert config.batch_plan(devices).num_micro_batches(0) == micro_steps


def test_a_batch_that_does_not_come_out_even_shows_the_numbers():
    config = TrainerConfig(train_batch_size=256, per_device_parallelism=64)
    with pytest.raises(ConfigError, match=r"64 \* 8 = 512"):
        config.batch_plan(8)


def test_default_parallelism_is_the_share_of_a_data_device():
    plan = TrainerConfig(train_batch_size=32, model_axis_size=2).batch_plan(8)
    assert (plan.data_axis_size, plan.micro_batch_size(0), plan.eval_batch_size) == (4, 8, 32)


def test_model_axis_must_divide_the_devices():
    with pytest.raises(ConfigError, match="number of devices = 6"):
        TrainerConfig(model_axis_size=4).batch_plan(6)


def test_batch_schedule():
    config = TrainerConfig(train_batch_size=[BatchStage(0, 32), BatchStage(1000, 64)])
    check(config)
    schedule = config.batch_plan(1).schedule
    assert (schedule.size(999), schedule.size(1500), schedule.offset(1500)) == (32, 64, 64_000)


@pytest.mark.parametrize(
    "settings",
    [
        {"train_batch_size": 0},
        {"train_batch_size": [BatchStage(5, 32)]},
        {"train_batch_size": [BatchStage(0, 32), BatchStage(0, 64)]},
        {"num_train_steps": 0},
        {"id": "../other"},
        {"fsdp_axis": ""},
        {"per_device_parallelism": -2},
        {"load_checkpoint": False, "load_checkpoint_path": "x"},
        {"skip_steps": [StepRange(-1, 3)]},
        {"skip_steps": [StepRange(3, 2)]},
        {"recover": RecoverConfig(window=0)},
        {"recover": RecoverConfig(window=4, batches_before=4)},
        {"recover": RecoverConfig(max_rollbacks=0)},
        {"recover": RecoverConfig(snapshot_every=0)},
        {"recover": RecoverConfig(), "crash_on_nan": False},
        {"recover": RecoverConfig(), "deepspeed": {}},
        {"recover": RecoverConfig(), "checkpointer": CheckpointerConfig(format="nanogpt")},
    ],
)
def test_refused(settings):
    with pytest.raises(ConfigError):
        check(TrainerConfig(**settings))


def test_minus_one_is_the_default():
    assert TrainerConfig(per_device_parallelism=-1).batch_plan(1).micro_batch_size(0) == 32


def test_eval_parallelism_must_divide_the_batch():
    config = TrainerConfig(train_batch_size=32, per_device_eval_parallelism=12)
    with pytest.raises(ConfigError, match="per_device_eval_parallelism"):
        config.batch_plan(1)
