"""What the other command lines would have their users type, and how they name things."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ostro.compat.nanogpt.settings import NanoGptConfig
from ostro.compat.translation import Translation
from ostro.runtime.commands import CommandLine, Dialect, Names, RunFacts, launched, typed_program

_NANOGPT = {
    "trainer.id": "out_dir",
    "trainer.per_device_parallelism": "batch_size",
    "trainer.train_batch_size": "batch_size * gradient_accumulation_steps",
    "optimizer.min_lr_ratio": "min_lr / learning_rate",
}
_GPT3 = {
    "trainer.id": "experiment_name",
    "trainer.per_device_parallelism": "micro_batch_size",
    "trainer.per_device_eval_parallelism": "micro_batch_size",
    "model.seq_len": "sequence_length",
    "optimizer.schedule_steps": "T_max",
    "optimizer.warmup": "warmup_steps",
    "optimizer.min_lr_ratio": "eta_min / learning_rate",
    "trainer.checkpointer.keep": "save_interval",
}
# Decided by a key that says something else.
_UNNAMED = {"vocab_size", "model.activation_function", "trainer.tracker", "data.tokenizer", "data"}


class NanoGptDialect(Dialect):
    """`python train.py key=value`."""

    def __init__(self, words: Sequence[str], made: Translation):
        """`words`: what was typed; `made`: how it was translated."""
        self._words, self._config = tuple(words), made.loaded.config
        assert isinstance(self._config, NanoGptConfig), "the translation is of nanoGPT's settings"
        self._script = typed_program(["python", "train.py"])
        self.spoken = _names(made, _NANOGPT).spoken

    def again(self, run: RunFacts) -> CommandLine:
        """Word by word."""
        return CommandLine(launched(self._script), self._words)

    def resume(self, run: RunFacts) -> CommandLine:
        """With `init_from=resume`."""
        return self.again(run).pair("init_from", "resume")

    def train_on(self, run: RunFacts, num_steps: int, epoch: int) -> CommandLine:
        """With more iterations; the decay as long as they were, where it was."""
        command = self.resume(run).without("trainer.num_train_steps").pair("max_iters", num_steps)
        if self._config.decay_lr and self._config.lr_decay_iters == self._config.max_iters:
            command = command.pair("lr_decay_iters", num_steps)
        return command.flag("epoch", epoch) if epoch else command

    def sample(self, run: RunFacts, prompt: str) -> CommandLine:
        """With the `sample.py` beside the `train.py`."""
        words = (f"out_dir={self._config.out_dir}", f"start={prompt}")
        return CommandLine(_beside(self._script, "sample.py"), words)


class Gpt3Dialect(Dialect):
    """`python3 src/train.py --config M --training_config T`."""

    def __init__(self, words: Sequence[str], made: Translation):
        """`words`: what was typed; `made`: how it was translated."""
        self._words, self._model_file = tuple(words), made.files["config"]
        self._script = typed_program(["python3", "src/train.py"])
        self.spoken = _names(made, _GPT3).spoken

    @property
    def program(self) -> tuple[str, ...]:
        """What starts it, launcher included."""
        return launched(self._script)

    def again(self, run: RunFacts) -> CommandLine:
        """Word by word, but for what launchers add."""
        return CommandLine(self.program, self._words).without("local_rank", "local-rank")

    def resume(self, run: RunFacts) -> CommandLine:
        """With `--resume_from_checkpoint` and the newest one."""
        return self.again(run).flag("resume_from_checkpoint", _latest(run))

    def train_on(self, run: RunFacts, num_steps: int, epoch: int) -> CommandLine:
        """The training file says how many steps; a flag of the native name counts more."""
        command = self.resume(run).flag("trainer.num_train_steps", num_steps)
        return command.flag("epoch", epoch) if epoch else command

    def sample(self, run: RunFacts, prompt: str) -> CommandLine:
        """With the `infer.py` beside the `train.py`."""
        words = ("--model_checkpoint", _latest(run), "--config", self._model_file)
        return CommandLine(_beside(self._script, "infer.py"), (*words, "--prompt", prompt))


def _latest(run: RunFacts) -> str:
    return str(Path(run.checkpoints) / "latest_checkpoint.pt")


def _beside(script: Sequence[str], name: str) -> tuple[str, ...]:
    """Another script in the folder of the one that runs."""
    *interpreter, path = script
    return (*interpreter, str(Path(path).with_name(name)))


def _names(made: Translation, others: Mapping[str, str]) -> Names:
    """The keys of a dialect by the native settings that they decide."""
    keys: dict[str, list[str]] = {}
    for key, paths in made.mapped.items():
        for path in paths:
            keys.setdefault(path, []).append(key)
    names = {path: " / ".join(dict.fromkeys(found)) for path, found in keys.items()}
    return Names({path: n for path, n in (names | dict(others)).items() if path not in _UNNAMED})
