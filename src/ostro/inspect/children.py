"""Training runs in child processes, forked from this one: quick to start, and free to die."""

import contextlib
import dataclasses
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ostro.checkpoint import CheckpointInterval
from ostro.distributed import DistributedConfig
from ostro.lm_config import TrainLmConfig, replace_trainer
from ostro.runtime.entry_point import entry_point
from ostro.runtime.phase import current_phase, listening
from ostro.tracker import JsonLoggerConfig
from ostro.train_lm import run
from ostro.trainer import Trainer

RUN_ID = "doctor"


@dataclass(frozen=True)
class Ended:
    """How a process of a run ended."""

    code: int  # -9 for one that signal 9 ended
    output: str  # what all processes of the run printed, the log included

    @property
    def tail(self) -> str:
        """The last lines of the output."""
        return "\n".join(self.output.splitlines()[-15:])


@dataclass(frozen=True)
class Orders:
    """What a process does beside training."""

    listener: Callable[[str], None] = lambda phase: None
    """Called with every phase that begins; may raise, signal, or never return."""
    on_ready: Callable[[Trainer], None] = lambda trainer: None
    """Called before the first update, when everything was restored."""
    wrapper: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext
    """Entered around the run."""


def quiet(config: TrainLmConfig, folder: Path, keep: Sequence[CheckpointInterval]) -> TrainLmConfig:
    """The same run with all that it leaves in `folder`, and checkpoints where `keep` says."""
    checkpointer = dataclasses.replace(
        config.trainer.checkpointer,
        base_path=f"{folder}/checkpoints/.",
        save_interval=None,
        keep=list(keep),
        save_after_eval="never",
        format="folder",
    )
    return replace_trainer(
        config,
        id=RUN_ID,
        log_dir=f"{folder}/logs/.",
        log_level="INFO",
        log_interval=1,
        tracker=JsonLoggerConfig(),
        progress=False,
        checkpointer=checkpointer,
        compile=config.trainer.compile is True,  # runs that are compared must not choose by a clock
        max_eval_batches=min(config.trainer.max_eval_batches or 2, 2),
    )


def train(
    config: TrainLmConfig,
    output: Path,
    orders: Sequence[Orders],
    *,
    patience: float = 3600.0,
    grace: float = 30.0,
) -> list[Ended]:
    """Train in as many processes as there are orders; returns how each ended, by rank.

    Once one has ended by a signal, the others have `grace` seconds to notice; then they are killed,
    and so is a process that takes longer than `patience` seconds.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    address = _free_address()
    pids = [_fork(config, output, o, rank, len(orders), address) for rank, o in enumerate(orders)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + patience
    try:
        while len(codes) < len(pids):
            for rank in set(range(len(pids))) - set(codes):
                found, status = os.waitpid(pids[rank], os.WNOHANG)
                if found:
                    codes[rank] = os.waitstatus_to_exitcode(status)
                    if codes[rank] < 0:
                        deadline = min(deadline, time.monotonic() + grace)
            if time.monotonic() > deadline:
                break
            time.sleep(0.005)
    finally:
        for rank in set(range(len(pids))) - set(codes):
            os.kill(pids[rank], signal.SIGKILL)
            os.waitpid(pids[rank], 0)
            codes[rank] = -signal.SIGKILL
    text = output.read_text(errors="replace")
    return [Ended(codes[rank], text) for rank in range(len(pids))]


def _fork(
    config: TrainLmConfig, output: Path, orders: Orders, rank: int, num_ranks: int, address: str
) -> int:
    if num_ranks > 1:
        distributed = dataclasses.replace(
            config.trainer.distributed,
            coordinator_address=address,
            num_processes=num_ranks,
            process_id=rank,
        )
    else:
        distributed = DistributedConfig()
    config = replace_trainer(config, distributed=distributed)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        with listening(orders.listener), orders.wrapper():
            code = entry_point(lambda signals: run(config, signals, orders.on_ready))
    except BaseException:  # what `entry_point` lets through is a crash
        sys.excepthook(*sys.exc_info())
        code = 1
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _free_address() -> str:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return f"127.0.0.1:{free.getsockname()[1]}"


def say(text: str) -> None:
    """A line into the run's output that is there even if the process dies at once."""
    os.write(2, f"doctor: {text}\n".encode())


def strike(signum: int, text: str) -> None:
    """Say what happens and where, then send this process a signal."""
    at = current_phase()
    say(f"{text}, the main thread in {at.name} of step {at.step}")
    os.kill(os.getpid(), signum)


def sleep_on() -> NoReturn:
    """Never return; the process has to be killed."""
    while True:
        time.sleep(60)
