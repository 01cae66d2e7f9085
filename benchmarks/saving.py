"""What saving costs a run: our checkpoint, written while training goes on, against `torch.save`.

    python -m benchmarks.saving [--json FILE] [--rounds 5] [--steps 20] [--folder DIR]

GPT-2 with 124M parameters and AdamW's moments, 1.5 GB in all, makes real updates on the CPU. A
round is three stretches of that many updates: one without a save, one with ours, and one with
`torch.save` and `fsync` of the same tensors, each after the third update. They take turns, so that
noise of the machine meets all of them; the order is turned from round to round.

Pause: the longest time that the training thread stands still for the save. Extra: how much longer
the stretch takes than the one without a save in the same round, until the checkpoint is complete.
One save before the first round pays for memory and caches; its pause is shown apart.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from ostro.allocator import keep_freed_memory
from ostro.checkpoint import CheckpointerConfig, State
from ostro.data.sequences import Batch
from ostro.distributed import World
from ostro.models import Gpt2Config
from ostro.optim import AdamConfig
from ostro.throughput import DevicePeak, Throughput
from ostro.tracker import CompositeTracker
from ostro.trainer import Trainer, TrainerConfig, allocate, build_model
from ostro.trainer.engine import TorchEngine
from ostro.units import Precision

VOCAB = 50304
SAVE_AFTER = 2  # the third update of a stretch


class Bench:
    """A run, the two ways to save it, and how long each held up the training thread."""

    def __init__(self, folder: Path, seq_len: int, batch_size: int):
        self.folder = folder
        cpu, model = torch.device("cpu"), Gpt2Config(seq_len=seq_len, gradient_checkpointing=False)
        config = TrainerConfig(
            train_batch_size=batch_size, mp=Precision.from_text("p=f32,c=bf16"), compile=False
        )
        adam = AdamConfig(learning_rate=1e-5)
        state = allocate(build_model(model, config, VOCAB, None), adam, config, cpu)
        self.state, self.pauses = state, [0.0]
        checkpoints = CheckpointerConfig(str(folder), save_interval=None, keep=[])
        self.checkpointer = checkpoints.build("ours", "ours")
        self.trainer = Trainer(
            config,
            config.batch_plan(1),
            TorchEngine(state, World(cpu), None),
            adam.schedule(10**6),
            max_grad_norm=1.0,
            tracker=CompositeTracker([]),
            throughput=Throughput(seq_len, 1, DevicePeak("cpu", 1.0, "")),
            before_update=lambda: self.held(self.checkpointer.before_update),
        )
        tokens = torch.randint(VOCAB, (batch_size, seq_len))
        self.batch = Batch(tokens, tokens.roll(-1, 1))
        self.checkpointer.prepare(self.state.tensors())  # as a run does

    def held(self, action: Callable[[], object]) -> None:
        """Time what keeps the training thread waiting."""
        start = time.perf_counter()
        action()
        self.pauses.append(time.perf_counter() - start)

    def stretch(self, save: Callable[[int], object] | None, num_steps: int) -> dict[str, float]:
        """Seconds of so many updates with one save among them, and its longest pause."""
        self.pauses = [0.0]
        start = time.perf_counter()
        for index in range(num_steps):
            step = self.state.step
            self.trainer.train_step(step, self.batch)
            self.state.step = step + 1
            if save is not None and index == SAVE_AFTER:
                self.held(lambda step=step: save(step))
        self.checkpointer.wait()
        return {"seconds": time.perf_counter() - start, "pause": max(self.pauses)}

    def ours(self, step: int) -> None:
        """As a run saves: the newest replaces the one before."""
        due = self.checkpointer.due(step, interrupted=True)
        assert due is not None
        self.checkpointer.save(step, due, lambda: State(self.state.tensors(), self.state.values()))

    def torch_save(self, step: int) -> None:
        """The plain way; the newest replaces the one before."""
        with open(self.folder / "new.pt", "wb") as file:
            torch.save(self.state.tensors(), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(self.folder / "new.pt", self.folder / "plain.pt")


def measure(bench: Bench, rounds: int, num_steps: int) -> dict:
    """Interleaved rounds of all three, and what follows from their medians."""
    ways = {"none": None, "ours": bench.ours, "torch.save": bench.torch_save}
    first = {name: bench.stretch(save, SAVE_AFTER + 3)["pause"] for name, save in ways.items()}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    for number in range(rounds):
        names = list(ways)
        for name in names[number % 3 :] + names[: number % 3]:
            found[name].append(bench.stretch(ways[name], num_steps))
            print(f"round {number + 1}: {name:10} {found[name][-1]}", flush=True)
    base = [each["seconds"] for each in found["none"]]
    results: dict = {"rounds": found, "first_pause": first}
    for name in ("ours", "torch.save"):
        extra = [each["seconds"] - b for each, b in zip(found[name], base, strict=True)]
        pause = statistics.median(each["pause"] for each in found[name])
        results[name] = {"pause": pause, "extra": statistics.median(extra)}
    plain = results["torch.save"]["pause"]
    results["pause_ratio"] = results["ours"]["pause"] / plain
    results["extra_ratio"] = results["ours"]["extra"] / plain
    results["step"] = statistics.median(base) / num_steps
    return results


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq_len", type=int, default=256)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where to save; default: a temporary folder")
    options = parser.parse_args()
    keep_freed_memory()  # as a run does
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        bench = Bench(Path(folder), options.seq_len, options.batch_size)
        results = measure(bench, options.rounds, options.steps)
    print(f"a step without saving takes {results['step']:.2f} s")
    for name in ("ours", "torch.save"):
        row = results[name]
        print(f"{name:10}  pause {1000 * row['pause']:6.0f} ms  extra {row['extra']:6.2f} s"
              f"  first pause {1000 * results['first_pause'][name]:6.0f} ms")  # fmt: skip
    print(f"of torch.save's own time: pause {results['pause_ratio']:.1%},"
          f" extra over {options.steps} steps {results['extra_ratio']:.1%}")  # fmt: skip
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
