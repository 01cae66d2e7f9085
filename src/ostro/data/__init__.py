"""Data: text files in, training examples out; the batch of a step is a pure function of it."""

from ostro.data.loader import Loader
from ostro.data.mixture import BatchSchedule
from ostro.data.sequences import IGNORE, Batch, EvalData, TrainData
from ostro.data.source import SourceConfig
from ostro.data.text import LMData, LMDatasetConfig
from ostro.data.tokenizer import Tokenizer, TokenizerConfig

__all__ = [
    "IGNORE",
    "Batch",
    "BatchSchedule",
    "EvalData",
    "LMData",
    "LMDatasetConfig",
    "Loader",
    "SourceConfig",
    "Tokenizer",
    "TokenizerConfig",
    "TrainData",
]
