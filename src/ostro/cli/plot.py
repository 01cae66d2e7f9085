"""`ostro plot`: the losses of runs as a picture, from their `metrics.jsonl`."""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ostro.cli.arguments import Parser
from ostro.core.errors import ConfigError, DataError, Problem
from ostro.runtime.signals import Signals
from ostro.tracker.json_logger import METRICS, read_metrics

_SUFFIXES = (".png", ".svg", ".pdf", ".jpg")
_Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Curves:
    """The losses of one run by step, without those that are not finite."""

    name: str
    """What the legend calls the run."""
    train: _Points
    """Loss of every training step."""
    validation: _Points
    """Loss of every evaluation."""


def plot(argv: list[str], signals: Signals) -> None:
    """`ostro plot RUN ... [-o loss.png]`"""
    parser = Parser("plot", "Draw the training and validation loss of one or several runs.", None)
    about = "folder of a run (logs/<run id>), of several, or a metrics.jsonl"
    parser.add_argument("runs", nargs="+", metavar="RUN", help=about)
    about = f"image to write: {', '.join(_SUFFIXES)}; default: %(default)s"
    parser.add_argument("-o", "--output", metavar="FILE", default="loss.png", help=about)
    options, _ = parser.parse(argv)
    files = dict.fromkeys(file for run in options.runs for file in find_metrics(run))
    pyplot = pyplot_for(options.output, "--output")
    runs = [read_curves(file) for file in files]
    found = [run for run in runs if run.train or run.validation]
    if not found:
        names = ", ".join(map(str, files))
        raise DataError(f"{names} - no loss is logged there yet - the first comes with step 0")
    save_figure(draw(pyplot, found), options.output, "--output")
    print(f"wrote {options.output}")


def find_metrics(run: str) -> list[Path]:
    """The `metrics.jsonl` that a word of the command line means: one, or those of several runs."""
    path = Path(run).expanduser()
    if path.is_file():
        return [path]
    for place in (path, path / "logs", Path("logs") / run):
        if (place / METRICS).is_file():
            return [place / METRICS]
    for pattern in (f"*/{METRICS}", f"*/logs/{METRICS}"):
        if several := sorted(path.glob(pattern)):
            return several
    rule = f"has no {METRICS}" if path.exists() else "does not exist"
    advice = f"give the folder that a run logs to; json_logger, a tracker, writes {METRICS} there"
    raise ConfigError(Problem("RUN", rule, advice, run))


def read_curves(file: Path) -> Curves:
    """The losses in one file; says what is left out."""
    figures = read_metrics(file)
    curves = [sorted(figures.values.get(name, {}).items()) for name in ("train/loss", "eval/loss")]
    finite = [[point for point in curve if math.isfinite(point[1])] for curve in curves]
    dropped = sum(map(len, curves)) - sum(map(len, finite))
    if figures.num_damaged:
        _note(f"{file} - {figures.num_damaged} lines are damaged or incomplete; skipped")
    if dropped:
        _note(f"{file} - {dropped} losses are not finite; left out")
    folder = file.parent.parent if file.parent.name == "logs" else file.parent
    return Curves(figures.run or folder.name or str(file), *finite)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def draw(pyplot: Any, runs: Sequence[Curves]) -> Any:
    """A figure: the training loss as a thin line, evaluations as dots, a colour for each run."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(8, 4.5))
    for index, run in enumerate(runs):
        before = f"{run.name}: " if len(runs) > 1 else ""
        colors = (f"C{index}", f"C{index}" if before else "C1")
        _curve(axes, run.train, f"{before}training loss", {"color": colors[0], "linewidth": 0.8})
        dots = {"color": colors[1], "marker": "o", "markersize": 4}
        _curve(axes, run.validation, f"{before}validation loss", dots)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _curve(axes: Any, points: _Points, label: str, style: Mapping[str, Any]) -> None:
    if points:
        dot = {"marker": "o"} if len(points) == 1 else {}  # one point makes no line
        axes.plot(*zip(*points, strict=True), label=label, **style | dot)


def pyplot_for(path: str, flag: str) -> Any:
    """Matplotlib, for an image that `flag` names; `ConfigError` where it cannot be made."""
    if Path(path).suffix not in _SUFFIXES:
        raise ConfigError(Problem(flag, f"must end in one of {', '.join(_SUFFIXES)}", value=path))
    try:
        import matplotlib
    except ImportError:
        rule = "needs matplotlib, which is not installed"
        raise ConfigError(Problem(flag, rule, 'pip install "ostro[plot]"', path)) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_figure(figure: Any, path: str, flag: str) -> None:
    """Write a figure to an image file."""
    try:
        figure.savefig(path, dpi=110, bbox_inches="tight")
    except OSError as error:
        rule = f"cannot be written: {error.strerror or error}"
        raise ConfigError(Problem(flag, rule, "name another file", path)) from error
