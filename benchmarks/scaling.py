"""Time and memory of a step against sequence length, batch and layers, beside what arithmetic says.

    python -m benchmarks.scaling [--rounds 5] [--json FILE]

A GPT-2 of 4 layers of 256 with 4,096 tokens in its vocabulary. The time of a step is fitted to the
smaller sizes by least squares of relative errors: a constant, a part that is linear in the size,
and for the sequence length one that is quadratic, as attention is. The larger sizes are then
predicted. Peak memory is fitted linearly, as no layer needs more. A ratio above 1 is slower, or
larger, than predicted. Every size is a process of its own; they take turns.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from benchmarks.common import (
    command_line,
    figure,
    paired_ratio,
    peak_memory,
    serve,
    spread,
    table,
    take_turns,
    workers,
)
from benchmarks.ours import build_trainer, fit, load_case, random_batch

MODEL = {"model.num_layers": 4, "model.hidden_dim": 256, "model.num_heads": 4, "vocab_size": 4096,
         "model.seq_len": 256, "trainer.train_batch_size": 4}  # fmt: skip
# setting: (sizes to fit, sizes to predict, powers of the fit of times, other settings)
LINES: dict[str, tuple[Sequence[int], Sequence[int], Sequence[int], dict[str, int]]] = {
    "model.seq_len": ((256, 512, 1024, 2048), (4096, 8192), (0, 1, 2),
                      {"trainer.train_batch_size": 1}),
    "trainer.train_batch_size": ((2, 4, 8), (16, 32), (0, 1), {}),
    "model.num_layers": ((2, 4, 8), (16, 32), (0, 1), {}),
}  # fmt: skip
SECONDS = 0.5  # of steps in a round


def worker(settings: dict[str, int]) -> None:
    """Our side of `serve`: seconds of a step, and the peak memory so far."""
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    config = load_case("gpt2_6x384", flags)
    trainer, batch = build_trainer(config), random_batch(config)
    fit(trainer, batch, 3)

    def steps(count: int) -> float:
        start = time.perf_counter()
        fit(trainer, batch, count)
        return (time.perf_counter() - start) / count

    count = max(1, round(SECONDS / steps(2)))
    serve(lambda _: {"seconds": steps(count), "peak_bytes": peak_memory()})


def predicted(
    sizes: Sequence[int], values: Sequence[float], powers: Sequence[int]
) -> Callable[[int], float]:
    """The fit: a sum of powers with factors that are not negative."""
    x, y = np.array(sizes, float), np.array(values)
    while True:
        columns = np.stack([x**power / y for power in powers], axis=1)
        scale = np.linalg.norm(columns, axis=0)
        factors = np.linalg.lstsq(columns / scale, np.ones(len(y)), rcond=None)[0] / scale
        if (factors >= 0).all():
            return lambda size: float(
                sum(f * size**p for f, p in zip(factors, powers, strict=True))
            )
        powers = [p for p, f in zip(powers, factors, strict=True) if f > min(factors)]


def measure_line(name: str, rounds: int) -> dict[str, Any]:
    """One table: every size measured, the larger ones beside their predictions."""
    small, large, powers, others = LINES[name]
    commands = {
        str(size): [sys.executable, "-m", "benchmarks.scaling", "--worker",
                    json.dumps(MODEL | others | {name: size})]
        for size in (*small, *large)
    }  # fmt: skip
    with workers(commands) as started:
        calls = {size: (lambda w=w: w.ask(None)) for size, w in started.items()}
        found = take_turns(calls, rounds)
    rows: dict[str, Any] = {}
    for size in (*small, *large):
        answers = found[str(size)]
        rows[str(size)] = {
            "seconds": spread(answer["seconds"] for answer in answers),
            "peak_bytes": answers[-1]["peak_bytes"],
        }
    fits = [
        predicted(small, [found[str(s)][number]["seconds"] for s in small], powers)
        for number in range(rounds)
    ]
    memory = predicted(small, [rows[str(s)]["peak_bytes"] for s in small], (0, 1))
    for size in large:
        row, times = rows[str(size)], [answer["seconds"] for answer in found[str(size)]]
        row["of_predicted"] = paired_ratio(times, [of_round(size) for of_round in fits])
        row["memory_of_predicted"] = row["peak_bytes"] / memory(size)
    return rows


def measure(rounds: int) -> dict[str, Any]:
    """All tables."""
    return {"lines": {name: measure_line(name, rounds) for name in LINES}}


def show(result: dict[str, Any]) -> str:
    """The tables."""
    tables = []
    for name, rows in result["lines"].items():
        shown = []
        for size, row in rows.items():
            of_time = figure(row["of_predicted"], digits=2) if "of_predicted" in row else "fitted"
            of_bytes = f"{row['memory_of_predicted']:.2f}" if "of_predicted" in row else "fitted"
            memory = f"{row['peak_bytes'] / 1e6:.0f}"
            shown.append([size, figure(row["seconds"], 1000, 1), of_time, memory, of_bytes])
        header = [name, "step, ms", "of predicted", "peak memory, MB", "of predicted"]
        tables.append(table(header, shown))
    return "\n\n".join(tables)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--worker")
    asked, _ = parser.parse_known_args()
    if asked.worker:
        worker(json.loads(asked.worker))
    else:
        command_line(measure, show, __doc__ or "")
