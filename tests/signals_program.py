"""Runs that send themselves a signal, for tests: `python signals_program.py FOLDER PHASE...`.

For each phase: train until rank `SIGNALLED` begins it for the third time and gets SIGTERM there,
then train on to the end. Each rank prints a line of JSON for each phase: what came of it.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
from tiny_run import read_metrics, write_config

from ostro.checkpoint import find_latest
from ostro.cli.main import run_command
from ostro.runtime.phase import listening

CHANGES = {
    "model": {"embed_pdrop": 0.1},
    "sample_prompts": ["the"],
    "sampling": {"max_new_tokens": 3},
    "trainer": {
        "num_train_steps": 8,
        "train_batch_size": 8,
        "per_device_parallelism": 2,
        "checkpointer": {"keep": [{"every": 2}]},
    },
}


def train(folder: Path, flags: list[str]) -> int:
    path = folder / "config.yaml"
    if os.environ.get("RANK", "0") == "0" and not path.exists():
        write_config(folder, **CHANGES)
    while not path.exists():
        time.sleep(0.01)
    return run_command(["train", "--config_path", str(path), *flags])


def stopped_in(folder: Path, phase: str, flags: list[str]) -> dict[str, object]:
    """How a run ends that gets a signal in `phase`, and how it goes on."""
    count, sent = 0, None

    def listener(begun: str) -> None:
        nonlocal count, sent
        count += begun == phase
        if count == 3 and sent is None and os.environ.get("RANK", "0") == os.environ["SIGNALLED"]:
            sent = time.monotonic()
            os.kill(os.getpid(), signal.SIGTERM)

    with listening(listener):
        code = train(folder, flags)
    seconds = None if sent is None else time.monotonic() - sent
    return {"code": code, "seconds": seconds, "then": train(folder, flags)}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = find_latest(str(folder / "checkpoints"))
    assert saved is not None
    return {f"{g}.{n}": t for g in saved.groups for n, t in saved.tensors(g).items()}


def main(root: Path, phases: list[str], flags: list[str]) -> None:
    train(root / "straight", flags)
    for phase in phases:
        found = stopped_in(root / phase, phase, flags)
        if os.environ.get("RANK", "0") == "0":  # which writes
            ours, straight = weights(root / phase), weights(root / "straight")
            same = [torch.equal(ours[name], straight[name]) for name in straight]
            same += [read_metrics(root / phase) == read_metrics(root / "straight")]
            found["same"] = all(same)
        sys.stdout.write(f"\nFOUND {json.dumps({'phase': phase, **found})}\n")


if __name__ == "__main__":
    words = sys.argv[2:]
    main(
        Path(sys.argv[1]), [w for w in words if "=" not in w], [f"--{w}" for w in words if "=" in w]
    )
