"""A tracker of your own: appends every figure to a CSV file."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ostro.tracker import RunInfo, Tracker, TrackerConfig


@TrackerConfig.register_subclass("csv")
@dataclass(frozen=True)
class CsvConfig(TrackerConfig):
    """Rows of step, name and value in a CSV file in the run's log folder."""

    filename: str = "metrics.csv"
    """Name of the file."""

    def build(self, run: RunInfo) -> Tracker:
        return CsvTracker(run.folder / self.filename)


class CsvTracker(Tracker):
    """Only `log` must be written; see `ostro.tracker.Tracker` for what else can be."""

    name = "csv"

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        with open(self._path, "a", newline="") as file:
            csv.writer(file).writerows((step, name, value) for name, value in metrics.items())
