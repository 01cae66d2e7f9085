"""The training loop, its configuration and the state between its steps."""

from ostro.trainer.autotune import choose, choose_kernels, compile_pays_off
from ostro.trainer.backends.torch import Engine, TorchEngine
from ostro.trainer.callbacks import Callback, CallbackConfig, StepInfo
from ostro.trainer.callbacks.evaluation import Evaluation
from ostro.trainer.callbacks.profile import ProfileConfig
from ostro.trainer.callbacks.sampling import Sampling
from ostro.trainer.callbacks.saving import Saving
from ostro.trainer.callbacks.snapshots import Snapshots
from ostro.trainer.config import BatchPlan, BatchStage, TrainerConfig
from ostro.trainer.rollback import RollBack
from ostro.trainer.start import (
    allocate,
    build_model,
    build_state,
    choose_engine,
    has_compiler,
    init_mesh,
    reset_state,
    restore,
    resume_source,
)
from ostro.trainer.state import TrainState
from ostro.trainer.trainer import Trainer, TrainingDivergedError
