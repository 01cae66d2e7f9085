"""What the benchmarks share: the machine and its limits, contenders that take turns, tables.

A benchmark is a module with `measure(rounds) -> dict`, plain JSON, and `show(result) -> str`, the
tables in Markdown; `command_line(measure, show)` makes it a command. Nothing here imports ostro, so
that a peer can run with an interpreter of its own.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

# What of a CPU decides how fast it trains.
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "sve")


def machine() -> dict[str, Any]:
    """What a figure needs beside it to mean anything: hardware, limits measured now, versions."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    fields = dict(line.split("\t", 1) for line in info.splitlines() if "\t" in line)
    about = {name.strip(): value.lstrip("\t: ") for name, value in fields.items()}
    flags = about.get("flags", about.get("Features", "")).split()
    return {
        "cpu": about.get("model name", platform.processor() or platform.machine()),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "cores": usable_cores(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "flops_f32": matrix_peak(torch.float32),
        "flops_bf16": matrix_peak(torch.bfloat16),
        "bytes_per_second": read_bandwidth(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "kernel": platform.release(),
    }


def show_machine(about: Mapping[str, Any]) -> str:
    """`machine()` in a sentence."""
    return (
        f"{about['cpu']} ({', '.join(about['flags'])}), {about['cores']} cores,"
        f" {about['threads']} threads, {about['memory_bytes'] / 1e9:.0f} GB; matrix products reach"
        f" {about['flops_f32'] / 1e9:.0f} GFLOP/s in float32 and {about['flops_bf16'] / 1e9:.0f} in"
        f" bfloat16, memory is read at {about['bytes_per_second'] / 1e9:.1f} GB/s;"
        f" torch {about['torch']}, Python {about['python']}, Linux {about['kernel']}"
    )


def usable_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def matrix_peak(dtype: torch.dtype, seconds: float = 0.6) -> float:
    """Operations per second of matrix products on all threads: the best of several sizes."""
    sizes, best = (1024, 2048, 4096), 0.0
    for size in sizes:
        a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
        out = torch.empty(size, size, dtype=dtype)
        fastest = fastest_of(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), seconds / 3)
        best = max(best, 2 * size**3 / fastest)
    return best


def read_bandwidth(num_bytes: int = 2**30, seconds: float = 0.6) -> float:
    """Bytes per second that all threads read from memory, caches too small for `num_bytes`."""
    data = torch.ones(num_bytes // 4)
    ones = torch.ones(4096)
    ways = (data.sum, lambda: torch.mv(data.view(-1, 4096), ones))
    return max(num_bytes / fastest_of(way, seconds / len(ways)) for way in ways)


def fastest_of(action: Callable[[], object], seconds: float) -> float:
    """Seconds of the fastest of the calls that fit into `seconds`, three at least."""
    found: list[float] = []
    action()  # pays for packing, kernel selection and new pages
    while len(found) < 3 or sum(found) < seconds:
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return min(found)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Least, median and greatest."""
    found = list(values)
    return {"min": min(found), "median": statistics.median(found), "max": max(found)}


def paired_ratio(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Spread of the quotients, round by round: a slow minute counts on both sides."""
    return spread(a / b for a, b in zip(above, below, strict=True))


def peak_memory() -> int:
    """Most bytes of this process that were in memory at once, since its start."""
    status = Path("/proc/self/status")
    if not status.exists():  # counts what the process was forked from, too; bytes on macOS
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


class Worker:
    """A contender: a process that sleeps until it is asked, and takes nothing from the others."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str] | None = None):
        pipe = subprocess.PIPE
        env = {**os.environ, **(environment or {})}
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=env)

    def ask(self, request: Any) -> Any:
        """Send a request, anything JSON can say, and wait for the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args} ended with code {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        with self.process:  # closes both ends and waits
            pass


@contextmanager
def workers(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Worker]]:
    """A process for each contender, ended on the way out."""
    started: dict[str, Worker] = {}
    try:
        for name, command in commands.items():
            started[name] = Worker(command)
        yield started
    finally:
        for worker in started.values():
            worker.close()


def serve(answer: Callable[[Any], Any]) -> None:
    """The other end of a `Worker`: answer requests until there are no more.

    What libraries print goes to the error stream.
    """
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        for line in sys.stdin:
            replies.write(json.dumps(answer(json.loads(line))) + "\n")
            replies.flush()


def take_turns(calls: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Call each once per round; another one begins every round. What they return, by name."""
    found: dict[str, list[Any]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            found[name].append(calls[name]())
        note(f"round {number + 1} of {rounds}")
    return found


def note(text: str) -> None:
    """Progress, beside the result."""
    print(text, file=sys.stderr, flush=True)


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table, the first column a name and the others figures."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def figure(values: Mapping[str, float], scale: float = 1.0, digits: int = 0) -> str:
    """A spread as `median (min to max)`, multiplied by `scale`."""
    low, middle, high = (f"{values[k] * scale:.{digits}f}" for k in ("min", "median", "max"))
    return f"{middle} ({low} to {high})"


def command_line(
    measure: Callable[[int], dict[str, Any]], show: Callable[[dict[str, Any]], str], about: str
) -> None:
    """Run a benchmark alone: `[--rounds N] [--json FILE]`; prints its tables."""
    parser = argparse.ArgumentParser(description=about.strip().splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result = measure(options.rounds)
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")


if __name__ == "__main__":
    print(show_machine(machine()))
