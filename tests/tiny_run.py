"""Small runs for tests that need a whole one."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import yaml

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "mix",
    "potions",
    "of",
    "light",
    "under",
    "an",
    "old",
    "bridge",
    "and",
    "nobody",
    "knows",
    "why",
]

TESTS = Path(__file__).parent
ROOT = TESTS.parent

_LAUNCHERS = ("RANK", "WORLD_SIZE", "MASTER_", "SLURM_", "OMPI_", "PMI_", "LOCAL_WORLD_SIZE")
PLAIN = {k: v for k, v in os.environ.items() if not k.startswith(_LAUNCHERS)}
"""The environment without what launchers leave in it."""

TINY = {
    "data": {"tokenizer": "bytes", "shuffle": True},
    "model": {
        "type": "gpt2",
        "seq_len": 16,
        "hidden_dim": 16,
        "num_layers": 2,
        "num_heads": 2,
        "gradient_checkpointing": False,
    },
    "optimizer": {"learning_rate": 1e-2, "warmup": 2},
    "trainer": {
        "num_train_steps": 6,
        "train_batch_size": 4,
        "steps_per_eval": 3,
        "max_eval_batches": 2,
        "log_interval": 2,
        "device": "cpu",
        "tracker": {"type": "json_logger"},
    },
}


def write_text(path: Path, num_words: int = 2000, seed: int = 0) -> Path:
    """A text file of random words."""
    drawn = random.Random(seed).choices(WORDS, k=num_words)
    path.write_text(" ".join(drawn) + "\n")
    return path


def merge(base: dict, change: dict) -> dict:
    """`change` over `base`, mappings merged."""
    merged = dict(base)
    for key, value in change.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged


def write_config(folder: Path, **changes: dict) -> Path:
    """A configuration of a tiny run whose data, cache, logs and checkpoints lie in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    train, validation = folder / "train.txt", folder / "validation.txt"
    if not train.exists():
        write_text(train)
        write_text(validation, 200, seed=1)
    own = {
        "data": {
            "train_urls": [str(train)],
            "validation_urls": [str(validation)],
            "cache_dir": str(folder / "cache"),
        },
        "trainer": {
            "id": "tiny",
            "log_dir": str(folder / "logs"),
            "checkpointer": {"base_path": str(folder / "checkpoints"), "save_interval": None},
        },
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(merge(merge(TINY, own), changes)))
    return path


def read_metrics(folder: Path, name: str = "train/loss", run_id: str = "tiny") -> dict[int, float]:
    """One metric of a run by step, as its json_logger wrote it."""
    lines = (folder / "logs" / run_id / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return {event["step"]: event[name] for event in events if name in event}


class Forker:
    """The process of `forker.py` of this one, started when it is first needed."""

    process: subprocess.Popen | None = None

    @classmethod
    def run(cls, order: dict, timeout: float) -> int:
        """The exit code of a command."""
        if cls.process is None:
            words = [sys.executable, str(Path(__file__).with_name("forker.py"))]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            cls.process = subprocess.Popen(words, text=True, **pipes)
        asked, told = cls.process.stdin, cls.process.stdout
        asked.write(json.dumps(order) + "\n")
        asked.flush()
        pid = int(told.readline())
        killer = threading.Timer(timeout, os.killpg, [pid, signal.SIGKILL])
        killer.start()
        code = int(told.readline())
        killer.cancel()
        return code


def ostro(*words: str | Path, timeout: float = 120, cwd: Path | str = ".", env: dict | None = None):
    """Run `ostro` as a user does, but for the seconds that importing it takes."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        command = [str(word) for word in words]
        order = {"words": command, "cwd": os.path.abspath(cwd), "env": env or dict(os.environ)}
        code = Forker.run({**order, "out": str(out), "err": str(err)}, timeout)
        texts = (path.read_text(errors="replace") for path in (out, err))
        return subprocess.CompletedProcess(command, code, *texts)


def torchrun(num_processes: int, *words: str | Path, **kwargs) -> subprocess.CompletedProcess:
    """Run `ostro` in several processes, as a user does with torchrun."""
    return subprocess.run(
        torchrun_words(num_processes, "-m", "ostro.cli.main", *words),
        capture_output=True,
        text=True,
        timeout=kwargs.pop("timeout", 180),
        check=False,
        **kwargs,
    )


def torchrun_words(num_processes: int, *words: str | Path) -> list[str]:
    """The command line that starts `words` in several processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*launcher, f"--nproc_per_node={num_processes}", *map(str, words)]


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("", 0))
        return str(found.getsockname()[1])
