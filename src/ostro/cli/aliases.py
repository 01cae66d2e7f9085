"""Other names of settings, as people know them from elsewhere. Inside there is one name."""

from ostro.config import Alias

_OPTIMIZER = ("learning_rate", "weight_decay", "min_lr_ratio", "beta1", "beta2", "epsilon",
              "max_grad_norm", "lr_schedule")  # fmt: skip


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError("must be a fraction between 0 and 1")
    return value


NATIVE = (
    Alias("trainer.batch_size", "trainer.train_batch_size"),
    Alias("trainer.per_device_train_parallelism", "trainer.per_device_parallelism"),
    Alias("trainer.eval_per_device_parallelism", "trainer.per_device_eval_parallelism"),
    Alias("trainer.wandb", "trainer.tracker", entry_type="wandb"),
    Alias("trainer.tracker.save_xla_dumps", "trainer.tracker.save_compile_dumps"),
    Alias("trainer.replica_ici_axis_size", "trainer.replica_axis_size"),
    Alias("trainer.replica_dcn_axis_size", "trainer.replica_axis_size"),
    *(Alias(f"trainer.{name}", f"optimizer.{name}") for name in _OPTIMIZER),
    Alias("trainer.warmup_ratio", "optimizer.warmup", convert=_fraction),
    Alias("optimizer.warmup_ratio", "optimizer.warmup", convert=_fraction),
)
"""The rows that the native command line takes."""
