"""Optimizers, learning-rate schedules, clipping and the skipping of bad steps."""

from ostro.optim.config import AdamConfig, OptimizerConfig
from ostro.optim.muon import MuonConfig
from ostro.optim.schedule import LrScheduleConfig, Schedule
from ostro.optim.skip_step import SkipStep, SkipStepConfig
from ostro.optim.state import (
    has_state,
    make_state,
    optimizer_tensors,
    require_resumable,
    take_numbers,
)
from ostro.optim.update import (
    LossScaler,
    apply_update,
    clip_scale,
    gradient_norm,
    set_learning_rate,
)
