"""Runs that finish, again and again on busy cores: `python endings_program.py COUNT FOLDER`.

Of one and of two processes in turn, each with checkpoints, the watchdog and two trackers. Prints a
line for each run that does not end with 0, and at last how many did. `tests/test_endings.py` makes
a few; by hand, a few hundred: a thread that is in native code when Python ends shows once in
thousands.
"""

import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from tiny_run import torchrun_words, write_config

TRAINER = {
    "num_train_steps": 4,
    "log_interval": 1,
    "steps_per_eval": 2,
    "tracker": [{"type": "json_logger"}, {"type": "tensorboard", "logdir": "logs"}],
    "hang_timeout": "5m",
    "checkpointer": {"keep": [{"every": 1}]},
}


def keep_busy(is_over: threading.Event) -> None:
    """Something for one core to do until the event is set."""
    program = "while True: pass"
    with subprocess.Popen([sys.executable, "-c", program]) as process:
        is_over.wait()
        process.kill()


def finished(number: int, folder: Path) -> tuple[int, str]:
    """Exit code and output of one run: of two processes where the number is odd."""
    path = write_config(folder, trainer=TRAINER | {"id": f"run{number}"})
    words = ["-m", "ostro.cli.main", "train", "--config_path", str(path)]
    command = torchrun_words(2, *words) if number % 2 else [sys.executable, *words]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    return done.returncode, done.stdout + done.stderr


def count_finished(
    count: int, folder: Path, say: Callable[[str], object], num_busy: int = 2
) -> int:
    """How many of so many runs end with 0, while other processes keep `num_busy` cores busy."""
    is_over, num_well = threading.Event(), 0
    hogs = [threading.Thread(target=keep_busy, args=[is_over]) for _ in range(num_busy)]
    for hog in hogs:
        hog.start()
    try:
        for number in range(count):
            code, text = finished(number, folder)
            num_well += code == 0
            if code:
                say(f"run {number} ended with {code}:\n{text}\n")
    finally:
        is_over.set()
    return num_well


if __name__ == "__main__":
    total = int(sys.argv[1])
    sys.stdout.write(f"{count_finished(total, Path(sys.argv[2]), sys.stdout.write)} of {total}\n")
