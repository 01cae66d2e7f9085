"""Muon against AdamW: nanoGPT's recipe for CPUs on the characters of Shakespeare, both in ostro.

    python data/shakespeare_char/prepare.py          # once; --text_file FILE without a network
    python -m benchmarks.muon [--rounds 3] [--json FILE]

`config/shakespeare_adamw.yaml` is nanoGPT's recipe, `config/shakespeare_muon.yaml` ours: it has to
reach the loss at which the other ends. A round trains both from a seed of its own, by turns; the
losses are those after the last update, over every window of the validation text. Seconds are those
of training, the checkpoint at its end included.
"""

import tempfile
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from benchmarks.common import command_line, figure, note, paired_ratio, spread, table, take_turns
from ostro.config import load
from ostro.distributed import World
from ostro.evaluation.losses import evaluate
from ostro.lm_config import TrainLmConfig
from ostro.runtime.malloc import keep_freed_memory
from ostro.runtime.signals import Signals
from ostro.train_lm import build_trainer

RUNS = {
    "AdamW": ["config/shakespeare_adamw.yaml"],
    "Muon": ["config/shakespeare_muon.yaml"],
    "Muon, bfloat16": ["config/shakespeare_muon.yaml", "--trainer.mp=p=f32,c=bfloat16"],
}


def train(preset: str, *changes: str, seed: int) -> dict[str, float]:
    """Train as the preset says; seconds, updates and loss."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--trainer.seed={seed}", "--trainer.id=run", f"--trainer.log_dir={folder}"]
        flags += [f"--trainer.checkpointer.base_path={folder}", "--trainer.progress=false"]
        flags += ["--trainer.steps_per_eval=null"]
        config = load(TrainLmConfig, [preset], [*flags, *changes]).config
        world = World(torch.device("cpu"))
        plan = config.trainer.batch_plan(1)
        _, trainer = build_trainer(config, plan, world, None, Signals(), {})
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
        # Every window once: nanoGPT's way draws some at random.
        assert trainer.saving is not None, "every run can save"
        evaluation = trainer.saving.evaluation
        windows = {name: replace(data, key=None) for name, data in evaluation.sets.items()}
        found = evaluate(
            trainer.state.model,
            windows,
            batch_size=128,
            token_bytes=evaluation.token_bytes,
            world=world,
        )
    return {"seconds": seconds, "steps": trainer.state.step, "loss": found["eval/loss"]}


def measure(rounds: int) -> dict[str, Any]:
    """All by turns, a seed a round."""
    keep_freed_memory()  # as a run does
    seeds = {name: iter(range(1337, 1337 + rounds)) for name in RUNS}

    def next_run(name: str) -> dict[str, float]:
        found = train(*RUNS[name], seed=next(seeds[name]))
        note(f"{name}: {found}")
        return found

    runs = take_turns({name: partial(next_run, name) for name in RUNS}, rounds)
    rows: dict[str, Any] = {}
    for name, found in runs.items():
        rows[name] = {key: spread(run[key] for run in found) for key in found[0]}
        rows[name]["mean_loss"] = sum(run["loss"] for run in found) / rounds
        seconds = [[run["seconds"] for run in each] for each in (found, runs["AdamW"])]
        rows[name]["time_ratio"] = paired_ratio(*seconds)
        rows[name]["reached"] = rows[name]["mean_loss"] <= rows["AdamW"]["mean_loss"]
    return {"runs": runs, "table": rows}


def show(result: dict[str, Any]) -> str:
    """Loss and time of all."""
    rows = [
        [
            name,
            f"{row['steps']['median']:.0f}",
            figure(row["loss"], digits=3),
            f"{row['mean_loss']:.3f}",
            figure(row["seconds"], digits=1),
            figure(row["time_ratio"], digits=2) if row["reached"] else "not reached",
        ]
        for name, row in result["table"].items()
    ]
    header = ["", "updates", "validation loss", "mean", "seconds", "of AdamW's time"]
    return table(header, rows)


if __name__ == "__main__":
    command_line(measure, show, __doc__)
