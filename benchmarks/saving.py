"""What saving costs a run: our checkpoint, written while training goes on, against `torch.save`.

    python -m benchmarks.saving [--json FILE] [--rounds 5]

GPT-2 with 124M parameters and AdamW's moments, 1.5 GB in all, makes real updates on the CPU. A
round is three stretches of updates: one without a save, one with ours, and one with `torch.save`
and `fsync` of the same tensors, each after the third update. They take turns, so that noise of the
machine meets all of them.

Pause: the longest time that the training thread stands still for the save. Longer by: how much
more time the stretch takes than the one without a save in the same round, until the checkpoint is
complete. One save before the first round pays for memory and caches; its pause is shown apart.

Then the files are written with nothing else going on, checksums included, in turns with `dd bs=1M
conv=fdatasync` of as many zeros. Disks take bursts: one write is fast, the next pays for it. So
there are three times as many turns, and times are compared together. OSTRO_BENCH_FOLDER names the
disk; else it is that of the temporary files.
"""

import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import command_line, figure, paired_ratio, spread, table, take_turns
from ostro.checkpoint import CheckpointerConfig, State, write
from ostro.core.units import Precision
from ostro.data.order.sequences import Batch
from ostro.distributed import World
from ostro.models import Gpt2Config
from ostro.optim import AdamConfig
from ostro.runtime.malloc import keep_freed_memory
from ostro.runtime.throughput import DevicePeak, Throughput
from ostro.tracker import CompositeTracker
from ostro.trainer import Trainer, TrainerConfig, allocate, build_model
from ostro.trainer.backends.torch import TorchEngine

VOCAB = 50304
SEQ_LEN, BATCH_SIZE = 256, 2
STEPS = 12  # in a stretch
SAVE_AFTER = 2  # the third update of a stretch


class Bench:
    """A run, the two ways to save it, and how long each held up the training thread."""

    def __init__(self, folder: Path):
        self.folder = folder
        cpu, model = torch.device("cpu"), Gpt2Config(seq_len=SEQ_LEN, gradient_checkpointing=False)
        config = TrainerConfig(
            train_batch_size=BATCH_SIZE, mp=Precision.from_text("p=f32,c=bf16"), compile=False
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
            throughput=Throughput(SEQ_LEN, 1, DevicePeak("cpu", 1.0, "")),
        )
        self.trainer.engine.before_update = lambda: self.held(self.checkpointer.before_update)
        tokens = torch.randint(VOCAB, (BATCH_SIZE, SEQ_LEN))
        self.batch = Batch(tokens, tokens.roll(-1, 1))
        self.checkpointer.prepare(self.state.tensors())  # as a run does

    def held(self, action: Callable[[], object]) -> None:
        """Time what keeps the training thread waiting."""
        start = time.perf_counter()
        action()
        self.pauses.append(time.perf_counter() - start)

    def stretch(
        self, save: Callable[[int], object] | None, num_steps: int = STEPS
    ) -> dict[str, float]:
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

    def write(self) -> float:
        """Seconds of the same files, durable, with nothing else going on."""
        start = time.perf_counter()
        write(str(self.folder / "alone"), State(self.state.tensors()), step=1, is_temporary=True)
        seconds = time.perf_counter() - start
        shutil.rmtree(self.folder / "alone")
        return seconds

    def dd(self) -> float:
        """Seconds in which `dd` writes as many bytes, durable."""
        mebibytes = self.num_bytes // 2**20
        command = ["dd", "if=/dev/zero", f"of={self.folder}/dd", "bs=1M", f"count={mebibytes}"]
        start = time.perf_counter()
        subprocess.run([*command, "conv=fdatasync"], check=True, capture_output=True)
        seconds = time.perf_counter() - start
        (self.folder / "dd").unlink()
        return seconds

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors of a checkpoint."""
        return sum(t.nbytes for named in self.state.tensors().values() for t in named.values())


def measure(rounds: int) -> dict[str, Any]:
    """Interleaved rounds of everything, and what follows from their medians."""
    keep_freed_memory()  # as a run does
    with tempfile.TemporaryDirectory(dir=os.environ.get("OSTRO_BENCH_FOLDER")) as folder:
        bench = Bench(Path(folder))
        ways = {"none": None, "ours": bench.ours, "torch.save": bench.torch_save}
        first = {name: bench.stretch(save, SAVE_AFTER + 3)["pause"] for name, save in ways.items()}
        calls = {name: partial(bench.stretch, save) for name, save in ways.items()}
        found = take_turns(calls, rounds)
        alone = take_turns({"ours": bench.write, "dd": bench.dd}, 3 * rounds)
        num_bytes = bench.num_bytes
    base = [each["seconds"] for each in found["none"]]
    plain = [each["pause"] for each in found["torch.save"]]
    result: dict[str, Any] = {"step": spread(seconds / STEPS for seconds in base)}
    for name in ("ours", "torch.save"):
        pauses = [each["pause"] for each in found[name]]
        extra = [each["seconds"] - b for each, b in zip(found[name], base, strict=True)]
        result[name] = {
            "pause": spread(pauses),
            "extra": spread(extra),
            "pause_ratio": paired_ratio(pauses, plain),
            "extra_ratio": statistics.median(extra) / statistics.median(plain),
            "first_pause": first[name],
        }
    result["bytes_per_second"] = {k: spread(num_bytes / s for s in v) for k, v in alone.items()}
    result["of_dd"] = paired_ratio(alone["dd"], alone["ours"])
    result["of_dd"]["together"] = sum(alone["dd"]) / sum(alone["ours"])
    return result


def show(result: dict[str, Any]) -> str:
    """The tables."""
    header = ["", "pause, ms", "of torch.save's", "first pause, ms", f"{STEPS} steps longer by, s"]
    rows = [
        [
            name,
            figure(result[name]["pause"], 1000),
            f"{result[name]['pause_ratio']['median']:.1%}",
            f"{1000 * result[name]['first_pause']:.0f}",
            figure(result[name]["extra"], digits=2),
        ]
        for name in ("ours", "torch.save")
    ]
    rates = result["bytes_per_second"]
    written = [[name, figure(rates[name], 1e-9, 2)] for name in rates]
    return "\n\n".join(
        [
            f"A step without saving takes {figure(result['step'], digits=2)} s.",
            table(header, rows),
            table(["alone", "GB/s"], written),
            f"All of them together: {result['of_dd']['together']:.0%} of dd's speed; "
            f"by turns {figure(result['of_dd'], 100)} %.",
        ]
    )


if __name__ == "__main__":
    command_line(measure, show, __doc__ or "")
