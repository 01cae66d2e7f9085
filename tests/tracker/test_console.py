"""What the console shows, on a terminal and elsewhere."""

import io
import logging
import sys

import pytest
from rich.console import Console

from ostro.runtime.run_log import logging_to
from ostro.tracker import ConsoleConfig, RunInfo, build_trackers
from ostro.tracker.console import ConsoleTracker, Pace, evaluation_line, figures_line


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(num_steps: int | None = 100, log_every: int | None = None, terminal: bool = False):
    """A console tracker that writes to a buffer, the buffer and its clock."""
    buffer, clock = io.StringIO(), Clock()
    console = Console(file=buffer, force_terminal=terminal, width=100, color_system=None)
    run = RunInfo("r1", num_steps=num_steps)
    return ConsoleTracker(ConsoleConfig(log_every), run, console, Pace(clock)), buffer, clock


def metrics(loss: float, speed: float | None = None) -> dict[str, float]:
    found = {"train/loss": loss, "optim/learning_rate": 6e-4, "optim/grad_norm": 1.0}
    return found if speed is None else found | {"throughput/tokens_per_second": speed}


def test_figures_line():
    figures = metrics(3.21449, 12345.0) | {"throughput/mfu": 41.23}
    expected = "loss 3.2145  lr 6.00e-04  12.3k tok/s  MFU 41.2%  1m20s left"
    assert figures_line(figures, 79.5) == expected
    assert figures_line({"train/loss": float("nan")}, None) == "loss nan"


def test_evaluation_line():
    found = {"eval/loss": 3.2, "eval/bpb": 1.12345, "eval/wiki/loss": 3.0, "eval/total_time": 9.0}
    expected = "evaluation at step 500: loss 3.2000  bpb 1.1235  wiki/loss 3.0000"
    assert evaluation_line(found, 500) == expected


def test_plain_lines_at_each_report_of_speed():
    tracker, buffer, clock = make()
    for burst in range(2):
        clock.now += 30
        for step in range(10 * burst, 10 * burst + 10):
            tracker.log(metrics(3.0, 2000.0 if step % 10 == 9 else None), step)
    tracker.log(metrics(2.5), 99)
    tracker.finish()
    assert buffer.getvalue().splitlines() == [
        "step 9/100  loss 3.0000  lr 6.00e-04  2k tok/s",
        "step 19/100  loss 3.0000  lr 6.00e-04  2k tok/s  4m left",
        "step 99/100  loss 2.5000  lr 6.00e-04  2k tok/s  0s left",
    ]


def test_plain_lines_every_so_many_steps():
    tracker, buffer, _ = make(num_steps=None, log_every=4)
    for step in range(10):
        tracker.log(metrics(3.0), step)
        tracker.log({"throughput/tokens_per_second": 1.0}, step)
    lines = buffer.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 0", "step 4", "step 8"]


@pytest.mark.parametrize("terminal", [False, True])
def test_evaluations_and_samples_are_printed_as_they_are(terminal):
    tracker, buffer, _ = make(terminal=terminal)
    tracker.log(metrics(3.0), 0)
    tracker.log({"eval/loss": 3.5}, 0)
    sample = "def f(x): return [bold]x[/bold] :smile: " + "long " * 30
    tracker.log_text("sample", sample, 0)
    tracker.finish()
    assert "evaluation at step 0: loss 3.5000\n" in buffer.getvalue()
    assert f"sample at step 0:\n{sample}\n" in buffer.getvalue()


def test_bar_on_a_terminal():
    tracker, buffer, _ = make(terminal=True)
    tracker.log(metrics(3.0), 0)
    tracker.log(metrics(2.75, 500.0), 41)
    tracker.finish()
    shown = buffer.getvalue()
    assert "41/100" in shown
    assert "loss 2.7500  lr 6.00e-04  500 tok/s" in shown
    assert shown.endswith("\n\x1b[?25h"), "the cursor is back, on a line of its own"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_messages_go_above_the_bar(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler(screen)
    logger = logging.getLogger("ostro")
    logger.addHandler(handler)
    try:
        console = Console(file=screen, force_terminal=True, width=60, color_system=None)
        tracker = ConsoleTracker(ConsoleConfig(), RunInfo("r1", num_steps=9), console)
        tracker.log(metrics(3.0), 0)
        assert handler.stream is sys.stderr or handler.stream is sys.stdout
        assert handler.stream is not screen
        logger.warning("a notice")
        tracker.finish()
        assert handler.stream is screen
        assert sys.stdout is screen
    finally:
        logger.removeHandler(handler)
    # The bar's line is erased before the notice and drawn again below it.
    before, after = screen.getvalue().split("a notice\n")
    assert before.endswith("\x1b[2K")
    assert "0/9" in after


def test_a_terminal_for_stdout_alone_leaves_stderr_alone(monkeypatch):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    monkeypatch.setattr(sys, "stderr", errors)
    console = Console(file=screen, force_terminal=True, width=60, color_system=None)
    tracker = ConsoleTracker(ConsoleConfig(), RunInfo("r1", num_steps=9), console)
    tracker.log(metrics(3.0), 0)
    print("to the file", file=sys.stderr)
    tracker.finish()
    assert errors.getvalue() == "to the file\n"


def test_pace_forgets_what_is_long_ago():
    clock = Clock()
    pace = Pace(clock, length=3)
    assert pace.seconds_for(10) is None
    for step, seconds in enumerate([100.0, 2.0, 2.0, 2.0, 2.0]):
        clock.now += seconds
        pace.mark(step)
    assert pace.seconds_for(10) == pytest.approx(20.0)
    for step in range(5, 50):  # a burst at the same moment is one mark
        pace.mark(step)
    assert pace.seconds_for(47) == pytest.approx(4.0)


def test_build_writes_to_standard_output(capsys):
    tracker = ConsoleConfig(log_every=1).build(RunInfo("r1", num_steps=2))
    tracker.log(metrics(1.0), 0)
    tracker.finish()
    assert capsys.readouterr().out == "step 0/2  loss 1.0000  lr 6.00e-04\n"


@pytest.mark.parametrize("config", [ConsoleConfig(), ConsoleConfig(on_terminal=False)])
@pytest.mark.parametrize("level", ["INFO", "WARNING"])
def test_the_log_file_has_steps_and_evaluations(tmp_path, capsys, config, level):
    path = tmp_path / "train.log"
    with logging_to(path, level):
        tracker = build_trackers(config, RunInfo("r1", num_steps=9))
        tracker.log(metrics(3.0), 0)
        tracker.log(metrics(2.5, 100.0), 1)
        tracker.log({"eval/loss": 3.5}, 1)
        tracker.log_text("sample/0", "two lines", 1)
        tracker.finish()
    expected = [
        "step 1/9  loss 2.5000  lr 6.00e-04  100 tok/s",
        "evaluation at step 1: loss 3.5000",
    ]
    expected = [*expected, "sample/0 at step 1:", "two lines"] if level == "INFO" else []
    lines = path.read_text().splitlines()
    assert [line.partition(" INFO ostro: ")[2] or line for line in lines] == expected
    shown = capsys.readouterr().out.splitlines()
    assert shown == (expected if config.on_terminal else [])


def test_the_log_file_has_steps_below_a_bar(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", screen := Terminal())
    with logging_to(tmp_path / "train.log"):
        console = Console(file=screen, force_terminal=True, width=60, color_system=None)
        tracker = ConsoleTracker(ConsoleConfig(), RunInfo("r1", num_steps=9), console)
        tracker.log(metrics(3.0, 100.0), 0)
        tracker.finish()
    assert "step 0/9  loss 3.0000" in (tmp_path / "train.log").read_text()
    assert "step 0/9" not in screen.getvalue()


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_of_nanogpt(terminal):
    """Its format strings, for multiples of the interval only; the last step is no exception."""
    buffer = io.StringIO()
    console = Console(file=buffer, force_terminal=terminal, color_system=None)
    config = ConsoleConfig(log_every=2, style="nanogpt")
    tracker = ConsoleTracker(config, RunInfo("r1", num_steps=4), console)
    rates = {"throughput/duration": 0.0850312, "throughput/mfu": 41.2}
    tracker.log({"eval/loss": 4.28231, "eval/train/loss": 4.28742, "eval/bpb": 1.0}, 0)
    for step, loss in enumerate([4.25, 3.123456, 2.0, 1.0]):
        tracker.log({"train/loss": loss, **rates}, step)
    tracker.finish()
    assert buffer.getvalue().splitlines() == [
        "step 0: train loss 4.2874, val loss 4.2823",
        "iter 0: loss 4.2500, time 85.03ms, mfu 41.20%",
        "iter 2: loss 2.0000, time 85.03ms, mfu 41.20%",
    ]
