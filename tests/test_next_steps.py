"""Every line that a run prints for its user to type is typed here, as it stands."""

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from tiny_run import ostro, torchrun_words, write_config, write_text

ROOT = Path(__file__).parents[1]

# Imported by the runs: a signal to themselves when a phase begins for the n-th time.
STOPPER = """
import os, signal
from ostro.runtime.phase import listening
phase, _, times = os.environ.get("STOP_AT", "").partition(":")
seen = []
def listener(begun):
    seen.append(begun)
    if begun == phase and seen.count(phase) == int(times):
        os.kill(os.getpid(), signal.SIGTERM)
listen = listening(listener)
listen.__enter__()
"""
BEFORE_A_SAVE, AFTER_A_SAVE = "data:1", "data:4"
NANOGPT = [
    *("n_layer=1", "n_head=2", "n_embd=16", "block_size=16", "batch_size=4", "dataset=tiny"),
    *("gradient_accumulation_steps=1", "max_iters=6", "eval_interval=6", "eval_iters=1"),
    *("warmup_iters=2", "lr_decay_iters=6", "learning_rate=1e-2", "min_lr=1e-3"),
    *("compile=False", "dtype=float32", "out_dir=an out"),
]


class Place:
    """A folder with all that a run of one dialect needs, and the command that starts it."""

    def __init__(self, folder: Path, dialect: str, *more: str):
        folder.mkdir(exist_ok=True)
        self.folder, self.dialect = folder, dialect
        (folder / "stopper.py").write_text(STOPPER)
        words = getattr(self, dialect)()
        self.first = [*words, "--imports", "[stopper]", *more]

    def native(self) -> list[str]:
        write_config(self.folder / "a run")
        return ["ostro", "train", "--config_path", "a run/config.yaml"]

    def nanogpt(self) -> list[str]:
        data = self.folder / "data" / "tiny"
        data.mkdir(parents=True)
        text = write_text(self.folder / "text.txt", 400).read_text()
        chars = sorted(set(text))
        ids = bytes(part for char in text for part in (chars.index(char), 0))
        (data / "train.bin").write_bytes(ids)
        (data / "val.bin").write_bytes(ids[:400])
        stoi = {char: index for index, char in enumerate(chars)}
        meta = {"vocab_size": len(chars), "itos": chars, "stoi": stoi}
        (data / "meta.json").write_text(json.dumps(meta))
        return ["python", str(ROOT / "train.py"), *NANOGPT]

    def gpt3(self) -> list[str]:
        write_text(self.folder / "text.txt", 400)
        model = {"n_layers": 1, "d_model": 16, "n_heads": 2}
        training = {
            "data": {"train_urls": ["text.txt"], "tokenizer": "bytes", "cache_dir": "cache"},
            "experiment_name": "an experiment",
            "max_steps": 6,
            "batch_size": 4,
        }
        for name, content in (
            ("model file.yaml", {**model, "context_length": 16, "vocab_size": 257}),
            ("training.yaml", training),
        ):
            (self.folder / name).write_text(yaml.safe_dump(content))
        script = str(ROOT / "src" / "train.py")
        return ["python3", script, "--config", "model file.yaml",
                "--training_config", "training.yaml"]  # fmt: skip

    def type(self, line: str | list[str], stop_at: str = "", code: int = 0) -> str:
        """What a command prints that is typed here."""
        words = shlex.split(line) if isinstance(line, str) else line
        env = {**os.environ, "STOP_AT": stop_at, "WANDB_MODE": "disabled"}
        if words[0] in ("torchrun", "tensorboard"):
            done = subprocess.run(
                words, cwd=self.folder, env=env, capture_output=True, text=True, timeout=180,
                check=False,
            )  # fmt: skip
        else:
            program = words[1:] if words[0] == "ostro" else words
            done = ostro(*program, cwd=self.folder, env=env)
        assert done.returncode == code, f"{words}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    @property
    def last_step(self) -> int:
        """The last step that the metrics of the run tell of."""
        (path,) = self.folder.rglob("metrics.jsonl")
        events = [json.loads(line) for line in path.read_text().splitlines()]
        return max(event["step"] for event in events if "train/loss" in event)


def next_steps(out: str) -> dict[str, str]:
    """The commands that a finished run prints, by what they are for."""
    found = re.findall(r"^  ([\w ]+): +(.*)$", out.partition("Next steps:\n")[2], re.M)
    assert {"train on", "sample"} <= {name for name, _ in found}, out
    return dict(found)


def advised(out: str, opening: str) -> str:
    """The command after these words; it is printed in the log and as the last words."""
    found = re.findall(rf"(?:{opening}): (.*)$", out, re.M)
    assert len(found) == 2 and len(set(found)) == 1, out
    return found[0]


@pytest.fixture(params=["native", "nanogpt", "gpt3"])
def place(request, tmp_path) -> Place:
    return Place(tmp_path / "a folder", request.param)


def check_next_steps(place: Place, out: str) -> None:
    """The run that said this is finished, and all that it says works."""
    last = place.last_step
    commands = next_steps(out)
    train_on = commands.pop("train on")
    assert place.type(commands.pop("sample")).strip()
    for command in commands.values():
        assert command.startswith("tensorboard --logdir")
        assert "train/loss" in place.type(f"{command} --inspect")
    out = place.type(train_on)
    assert f"Trained {last + 1} steps" in out and place.last_step == 2 * last + 1


def test_a_finished_run(place):
    check_next_steps(place, place.type(place.first))


def test_interrupted_before_anything_was_saved(place):
    out = place.type(place.first, stop_at=BEFORE_A_SAVE, code=143)
    again = advised(out, "Start again with")
    assert "Resume with" not in out
    assert "Trained 6 steps" in place.type(again)


def test_interrupted_after_a_save(place):
    out = place.type(place.first, stop_at=AFTER_A_SAVE, code=143)
    resume = advised(out, "Resume with")
    out = place.type(resume, stop_at=BEFORE_A_SAVE, code=143)  # there is a checkpoint all the same
    out = place.type(advised(out, "Resume with|Start again with"))
    assert re.search(r"Trained [34] steps", out) and place.last_step == 5
    assert not re.search(r": was .*, now ", out), "nothing has changed"
    next_steps(out)


@pytest.mark.parametrize("dialect", ["native", "nanogpt", "gpt3"])
def test_passes_over_the_data_decide(tmp_path, dialect):
    many = {"nanogpt": "max_iters=10_000"}.get(dialect, "--trainer.num_train_steps=10_000")
    words = ["--epoch", "1", many, "--trainer.train_batch_size", "64"]
    if dialect == "nanogpt":
        words += ["--data.sampling=permutation", "--trainer.checkpointer.save_last=true"]
    place = Place(tmp_path, dialect, *words)
    out = place.type(place.first)
    last = place.last_step
    assert last < 1000
    out = place.type(next_steps(out)["train on"])
    assert place.last_step == 2 * last + 1, out


def test_the_documents_of_a_batch_that_diverged(tmp_path):
    place = Place(tmp_path, "native", "--optimizer.learning_rate", "1e30")
    out = place.type(place.first, code=2)
    (command,) = re.findall(r"See the documents of that batch with: (.*)$", out, re.M)
    assert "examples of 16 tokens" in place.type(command)


def test_torchrun_is_part_of_the_advice(tmp_path):
    place = Place(tmp_path, "nanogpt")
    words = [*torchrun_words(2, *place.first[1:])]
    done = subprocess.run(
        words, cwd=place.folder, env={**os.environ, "STOP_AT": ""}, capture_output=True, text=True,
        timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    train_on = next_steps(done.stdout)["train on"]
    assert train_on.startswith("torchrun --nproc_per_node=2 --standalone")
    out = place.type(train_on)
    assert "Trained 6 steps" in out and place.last_step == 11


def test_workers_of_its_own_are_not_torchruns(tmp_path):
    place = Place(tmp_path, "gpt3", "--gpus_per_node", "2")
    done = subprocess.run(
        place.first, cwd=place.folder, env={**os.environ, "STOP_AT": ""}, capture_output=True,
        text=True, timeout=180, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert next_steps(done.stdout)["train on"].startswith(f"python3 {ROOT}/src/train.py --config")
