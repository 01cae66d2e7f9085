"""The training loop, its configuration and the state between its steps."""

from ostro.trainer.config import BatchPlan, BatchStage, TrainerConfig
from ostro.trainer.state import TrainState
from ostro.trainer.trainer import Trainer, TrainingDivergedError

__all__ = [
    "BatchPlan",
    "BatchStage",
    "TrainState",
    "Trainer",
    "TrainerConfig",
    "TrainingDivergedError",
]
