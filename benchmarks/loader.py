"""What reading the data costs a training step, also of a billion tokens.

    python -m benchmarks.loader [--rounds 5] [--json FILE]

For each case of `benchmarks/configs` the trainer's own loop makes updates with the run's loader,
which reads random windows of a sparse file of 10^9 tokens: how much of the time it waited for a
batch. Beside it the processor time of one batch, from files of 10^7 and 10^9 tokens, which another
thread spends while a step is made. Then, at the sizes of the first case: seconds from the
configuration to the first batch when the files are known (and at their very first start, when
their largest id is looked for, once), and memory that is not the files' own before and after many
batches.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import command_line, figure, note, spread, table
from benchmarks.ours import CASES, build_trainer, fit, load_case, random_batch
from ostro.data.loader import Loader
from ostro.data.order.sequences import Batch
from ostro.data.sources.source import TokensSource
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer_config import BytesTokenizer
from ostro.trainer import Trainer

SIZES = (10**7, 10**8, 10**9)
SECONDS = 2.0  # of steps in a round
MANY = 20_000


def loader_of(folder: Path, num_tokens: int, seq_len: int, trainer: Trainer) -> Loader:
    """The loader of a run over a sparse file of so many tokens, all of id 0."""
    path = folder / f"{num_tokens}.bin"
    if not path.exists():
        with open(path, "wb") as file:
            file.truncate(2 * num_tokens)
    source = TokensSource(train_bin=[str(path)])
    config = LMDatasetConfig(
        source=source, tokenizer=BytesTokenizer(), cache_dir=str(folder / str(num_tokens))
    )
    data = config.build(config.build_tokenizer(), seq_len, seed=0)
    return Loader(data.train, trainer.plan.schedule)


def waited(trainer: Trainer, loader: Loader, num_steps: int) -> float:
    """The share of the time of so many updates that the loop waited for batches."""
    waiting, first = 0.0, trainer.state.step

    def batches() -> Iterator[Batch]:
        nonlocal waiting
        coming = loader.batches(range(first, first + num_steps))
        for _ in range(num_steps):
            start = time.perf_counter()
            batch = next(coming)
            waiting += time.perf_counter() - start
            yield batch

    trainer.config = replace(trainer.config, num_train_steps=first + num_steps)
    start = time.perf_counter()
    trainer.fit(batches())
    return waiting / (time.perf_counter() - start)


def per_batch(loader: Loader, count: int = 300) -> float:
    """Processor seconds of reading one batch."""
    start = time.thread_time()
    for step in range(count):
        loader.batch(step)
    return (time.thread_time() - start) / count


def seconds_of(action: Callable[[], object]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def own_memory() -> int:
    """Bytes of this process in memory that belong to no file."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure_case(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Step, waiting and processor time of one case."""
    config = load_case(name)
    trainer, seq_len = build_trainer(config), config.model.seq_len
    loaders = {size: loader_of(folder, size, seq_len, trainer) for size in (SIZES[0], SIZES[-1])}
    batch = random_batch(config)
    fit(trainer, batch, 3)
    step = seconds_of(lambda: fit(trainer, batch, 3)) / 3
    count = max(3, round(SECONDS / step))
    steps = [seconds_of(lambda: fit(trainer, batch, count)) / count for _ in range(rounds)]
    shares = [waited(trainer, loaders[SIZES[-1]], count) for _ in range(rounds)]
    each = {str(n): spread(per_batch(one) for _ in range(rounds)) for n, one in loaders.items()}
    note(name)
    return {"step": spread(steps), "waited": spread(shares), "per_batch": each}


def measure(rounds: int) -> dict[str, Any]:
    """All cases, start-up and memory."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        cases = {name: measure_case(name, folder, rounds) for name in CASES}
        config = load_case(CASES[0])
        trainer = build_trainer(config)
        started: dict[str, Any] = {}
        fresh = folder / "started"
        fresh.mkdir()
        for size in SIZES:

            def begin(size: int = size) -> object:
                return loader_of(fresh, size, config.model.seq_len, trainer).batch(0)

            first = seconds_of(begin)
            known = spread(seconds_of(begin) for _ in range(rounds))
            started[str(size)] = {"first": first, "known": known}
        loader = loader_of(folder, SIZES[-1], config.model.seq_len, trainer)
        for step in range(1000):
            loader.batch(step)
        before = own_memory()
        for step in range(MANY):
            loader.batch(step)
        memory = {"before": before, "after": own_memory(), "batches": MANY}
    return {"cases": cases, "started": started, "memory": memory}


def show(result: dict[str, Any]) -> str:
    """The tables."""
    rows = []
    for name, found in result["cases"].items():
        small, large = found["per_batch"].values()
        share = large["median"] / found["step"]["median"]
        rows.append([
            name, figure(found["step"], 1000, 1), figure(found["waited"], 100, 2),
            figure(small, 1e6), figure(large, 1e6), f"{share:.2%}",
        ])  # fmt: skip
    header = ["", "step, ms", "waited for a batch, % of it", "a batch of 10^7 tokens, us",
              "of 10^9, us", "share of a step"]  # fmt: skip
    starts = [
        [f"{int(size):.0e}", figure(found["known"], 1000, 1), f"{1000 * found['first']:.0f}"]
        for size, found in result["started"].items()
    ]
    memory = result["memory"]
    grown = (memory["after"] - memory["before"]) / 1e6
    return "\n\n".join(
        [
            table(header, rows),
            table(["tokens", "to the first batch, ms", "at the very first start, ms"], starts),
            f"Over {memory['batches']} batches memory grew by {grown:.1f} MB.",
        ]
    )


if __name__ == "__main__":
    command_line(measure, show, __doc__ or "")
