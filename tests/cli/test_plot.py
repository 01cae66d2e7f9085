"""`ostro plot`: losses out of `metrics.jsonl`, whatever state the file is in."""

import json
import sys
from pathlib import Path

import pytest
from matplotlib import pyplot
from matplotlib.colors import same_color
from PIL import Image

from ostro.cli.main import run_command
from ostro.cli.plot import draw, find_metrics, pyplot_for, read_curves
from ostro.core.errors import ConfigError
from ostro.tracker.json_logger import read_metrics


def write(folder: Path, *events: dict | str) -> Path:
    """A run's folder with these lines."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [event if isinstance(event, str) else json.dumps(event) for event in events]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def start(run: str = "r1", event: str = "start", step: int = 0) -> dict:
    return {"step": step, "event": event, "run": run, "config": {}}


def train(steps: range, loss: float = 3.0) -> list[dict]:
    return [{"step": step, "train/loss": loss - 0.1 * step} for step in steps]


def evaluation(step: int, loss: float) -> dict:
    return {"step": step, "eval/loss": loss, "eval/bpb": 1.0}


def plot(*words: object, code: int = 0) -> None:
    assert run_command(["plot", *map(str, words)]) == code


def lines_of(figure) -> dict[str, list[tuple[float, float]]]:
    """What is drawn: label -> points."""
    lines = figure.axes[0].get_lines()
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in lines}


def test_a_run_with_evaluations(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = write(tmp_path / "logs" / "r1", start(), *train(range(3)), evaluation(0, 4.0))
    plot(run)
    assert capsys.readouterr().out == "wrote loss.png\n"
    with Image.open("loss.png") as image:
        assert image.size[0] > 400
    figure = draw(pyplot, [read_curves(run / "metrics.jsonl")])
    assert lines_of(figure) == {
        "training loss": [(0, 3.0), (1, 2.9), (2, 2.8)],
        "validation loss": [(0, 4.0)],
    }
    figure.canvas.draw()
    labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert {"3.0", "4.0"} <= set(labels)


@pytest.mark.parametrize("events", [train(range(4)), [evaluation(0, 4.0)], train(range(1))])
def test_a_run_with_one_kind_of_loss_has_numbers_at_its_axes(tmp_path, events):
    run = write(tmp_path / "r1", start(), *events)
    figure = draw(pyplot, [read_curves(run / "metrics.jsonl")])
    (points,) = lines_of(figure).values()
    assert len(points) == len(events)
    figure.canvas.draw()
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    assert low <= points[0][1] <= high
    for axis in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert all(float(label.get_text().replace("−", "-")) is not None for label in axis)


def test_several_runs_have_a_colour_each(tmp_path):
    for name in ("a", "b"):
        write(tmp_path / name, start(name), *train(range(3)), evaluation(2, 3.5))
    files = find_metrics(str(tmp_path))
    assert [file.parent.name for file in files] == ["a", "b"]
    figure = draw(pyplot, [read_curves(file) for file in files])
    assert list(lines_of(figure)) == [
        "a: training loss", "a: validation loss", "b: training loss", "b: validation loss"
    ]  # fmt: skip
    a, a_eval, b, _ = (line.get_color() for line in figure.axes[0].get_lines())
    assert same_color(a, a_eval) and not same_color(a, b)


@pytest.mark.parametrize("word", ["logs/r1", "r1", "logs/r1/metrics.jsonl", "logs", "out", "here"])
def test_a_run_may_be_named_in_many_ways(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    for folder in ("logs/r1", "out", "here/logs"):
        write(tmp_path / folder, start())
    assert len(find_metrics(word)) == 1


def test_lost_attempts_are_left_out(tmp_path):
    """After a resume, a roll-back, and a start anew in the same file."""
    old = [start("old"), *train(range(9), 9.0)]
    first = [start(), *train(range(6), 5.0), evaluation(4, 4.5), evaluation(5, 4.4)]
    second = [start(event="resume", step=4), *train(range(4, 8), 3.0)]
    back = [{"step": 6, "event": "rollback", "from": 8, "to": 6}, *train(range(6, 7), 1.0)]
    run = write(tmp_path / "r1", *old, *first, *second, *back)
    curves = read_curves(run / "metrics.jsonl")
    expected = [5.0 - 0.1 * k for k in range(4)] + [3.0 - 0.1 * k for k in (4, 5)] + [0.4]
    assert [step for step, _ in curves.train] == list(range(7))
    assert [loss for _, loss in curves.train] == pytest.approx(expected)
    assert curves.validation == [(4, 4.5)], "it was before update 4, in nanoGPT's order"
    assert curves.name == "r1"


def test_damaged_lines_are_counted_and_losses_that_are_not_finite_left_out(tmp_path, capsys):
    long = '{"step": 1, "train/loss": 1' + "0" * 5000 + "}"
    bad = ['{"step": 2, "train/lo', "[1]", '{"train/loss": 1}', '{"step": "x"}', "\x00", long]
    nan = ['{"step": 7, "train/loss": NaN}', '{"step": 8, "eval/loss": -Infinity}']
    run = write(tmp_path / "r1", start(), *train(range(2)), *bad, "", *nan, *train(range(3, 4)))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'\xff\xfe{"step": 4, "train/loss": 2.0')
    assert read_metrics(run / "metrics.jsonl").num_damaged == len(bad) + 1
    plot(run, "-o", tmp_path / "loss.svg")
    notes = capsys.readouterr().err
    assert "7 lines are damaged or incomplete" in notes and "2 losses are not finite" in notes
    assert [step for step, _ in read_curves(run / "metrics.jsonl").train] == [0, 1, 3]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "RUN = nowhere - does not exist"),
        (["empty"], "has no metrics.jsonl"),
        (["blank"], "no loss is logged there yet"),
        (["r1", "-o", "loss.gif"], "--output = loss.gif - must end in one of .png"),
        (["r1", "-o", "no/such/loss.png"], "cannot be written: No such file"),
        ([], "the following arguments are required: RUN"),
        (["r1", "--colour", "red"], "unknown option --colour"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "blank", start())
    write(tmp_path / "r1", start(), *train(range(2)))
    plot(*words, code=2)
    assert says in capsys.readouterr().err


def test_without_matplotlib_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"ostro\[plot\]"):
        pyplot_for(str(tmp_path / "loss.png"), "--output")
