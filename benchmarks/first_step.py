"""Seconds from the start of a process to its first update done: a small model, no compilation.

    python -m benchmarks.first_step [--rounds N] [--json FILE]

A GPT-2 of 4 x 128 on a small text whose token cache is there; beside `ostro train` a script of bare
torch without configuration, tokenizer, logs or checkpoints, and the same model by transformers.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import common

CONFIG = """
data: {train_urls: [text.txt], tokenizer: bytes, cache_dir: cache}
model: {seq_len: 64, hidden_dim: 128, num_layers: 4, num_heads: 4, gradient_checkpointing: false}
trainer: {train_batch_size: 12, num_train_steps: 1, tracker: []}
"""
SIZES = {
    "peer": "transformers_models", "family": "gpt2", "vocab_size": 256, "seq_len": 64,
    "hidden_dim": 128, "num_layers": 4, "num_heads": 4, "batch_size": 12, "compiled": False,
    "dtype": "f32",
}  # fmt: skip


def first_line(command: list[str], folder: str, words: str) -> float:
    """Seconds until the command, which is then waited for, has printed a line with these words."""
    pipe, start = subprocess.PIPE, time.perf_counter()
    options: dict[str, Any] = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, cwd=folder, text=True, **options) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("1\n")  # what asks a worker for a step
        process.stdin.close()
        seconds = [time.perf_counter() - start for line in process.stdout if words in line]
    if process.returncode or not seconds:
        raise SystemExit(f"{command} failed with code {process.returncode}")
    return seconds[0]


def measure(rounds: int) -> dict[str, Any]:
    """Interleaved starts; the one before them makes the cache of tokens."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "text.txt").write_text("All the world's a stage, and all the men.\n" * 5000)
        Path(folder, "run.yaml").write_text(CONFIG)
        python = [sys.executable, "-m"]
        root = str(Path(__file__).parents[1])
        train = [*python, "ostro.cli.main", "train", "--config_path", f"{folder}/run.yaml"]
        bare = [*python, "benchmarks.peers.bare_start", f"{folder}/text.txt"]
        theirs = [*python, "benchmarks.peers.step", json.dumps(SIZES)]
        calls = {
            "ostro": lambda: first_line(train, folder, "loss"),
            "bare torch": lambda: first_line(bare, root, "loss"),
            "transformers": lambda: first_line(theirs, root, "loss"),
        }
        common.take_turns(calls, 1)
        found = common.take_turns(calls, rounds)
    peers = [name for name in found if name != "ostro"]
    return {
        "seconds": {name: common.spread(values) for name, values in found.items()},
        "ratio": {name: common.paired_ratio(found[name], found["ostro"]) for name in peers},
    }


def show(result: dict[str, Any]) -> str:
    """A row for each contender."""
    rows = []
    for name, seconds in result["seconds"].items():
        ratio = result["ratio"].get(name)
        times = common.figure(ratio, digits=2) if ratio else ""
        rows.append([name, common.figure(seconds, digits=2), times])
    return common.table(["", "seconds", "ostro is so many times as fast"], rows)


if __name__ == "__main__":
    common.command_line(measure, show, __doc__)
