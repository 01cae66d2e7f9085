"""The training loop, its configuration and the state between its steps."""

from ostro.trainer.autotune import choose, compiling_pays
from ostro.trainer.backends.torch import Engine, TorchEngine
from ostro.trainer.config import BatchPlan, BatchStage, TrainerConfig
from ostro.trainer.start import (
    allocate,
    begin_again,
    build_model,
    build_state,
    choose_engine,
    find_start,
    has_compiler,
    lay_out,
    restore,
)
from ostro.trainer.state import TrainState
from ostro.trainer.trainer import Trainer, TrainingDivergedError
