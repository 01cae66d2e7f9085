"""Trackers: where the figures of a run go."""

from ostro.tracker.console import ConsoleConfig
from ostro.tracker.json_logger import JsonLoggerConfig
from ostro.tracker.tensorboard import TensorboardConfig
from ostro.tracker.tracker import (
    CompositeTracker,
    NoopConfig,
    RunInfo,
    Tracker,
    TrackerConfig,
    build_trackers,
    run_folder,
)
from ostro.tracker.wandb import WandbConfig
