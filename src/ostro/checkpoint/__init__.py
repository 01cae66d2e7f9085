"""Checkpoints: when to save, atomic and checksummed storage, and what to resume from."""

from ostro.checkpoint.checkpointer import (
    Checkpointer,
    CheckpointerConfig,
    Due,
    SaveReport,
    deletions,
    disk_bytes,
    require_budget,
)
from ostro.checkpoint.compare import average, differences
from ostro.checkpoint.decision import ResumeSource, find_resume_source
from ostro.checkpoint.discovery import (
    delete,
    entries,
    find_latest,
    look,
    open_entry,
    scan,
    verified,
)
from ostro.checkpoint.lock import alone_in
from ostro.checkpoint.metadata import Metadata, read_settings
from ostro.checkpoint.pieces import Stored, copy_into, whole
from ostro.checkpoint.policy import CheckpointInterval, Policy
from ostro.checkpoint.retention import Entry, to_prune, total_bytes
from ostro.checkpoint.saved import Saved, load
from ostro.checkpoint.single_file import SavedFile, register_format, write_file
from ostro.checkpoint.store import State, checkpoint_bytes, write
