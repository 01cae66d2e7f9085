"""The commands that a run prints for its user to type, all made in one rank_info.

A command is a value: the words that start the program, and the words after them. The one that
started this process is read from the interpreter and from what a launcher has put into the
environment; what to type next is that command with some settings changed, so a user's own words
stay and typing it works in the same folder:

    torchrun --nproc_per_node=2 --standalone train.py batch_size=8 init_from=resume

A `Dialect` makes them in the words of one command line, and says messages with its names.
"""

import os
import re
import shlex
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ostro.distributed.launchers import find_rank_info

STARTED_AS = "OSTRO_STARTED_AS"
"""Environment variable: the program a user typed, where it starts its own workers."""


@dataclass(frozen=True)
class CommandLine:
    """A command: what starts it, and the words after that."""

    program: tuple[str, ...]
    words: tuple[str, ...] = ()

    def __str__(self) -> str:
        return shlex.join([*self.program, *self.words])

    def without(self, *names: str) -> "CommandLine":
        """Without the settings of these names, however they are spelled."""
        kept = (group for group in grouped(self.words) if _name(group[0]) not in names)
        return CommandLine(self.program, tuple(word for group in kept for word in group))

    def flag(self, name: str, value: object) -> "CommandLine":
        """With `--name value`, in place of another value of it."""
        return CommandLine(self.program, (*self.without(name).words, f"--{name}", str(value)))

    def pair(self, name: str, value: object) -> "CommandLine":
        """With `name=value`, in place of another value of it."""
        return CommandLine(self.program, (*self.without(name).words, f"{name}={value}"))


def grouped(words: Sequence[str]) -> Iterator[list[str]]:
    """The words; a flag together with the value behind it."""
    rest = list(words)
    while rest:
        group = [rest.pop(0)]
        is_open = group[0].startswith("--") and "=" not in group[0]
        if is_open and rest and not rest[0].startswith("--") and "=" not in rest[0]:
            group.append(rest.pop(0))
        yield group


def _name(word: str) -> str:
    return word.removeprefix("--").partition("=")[0]


def typed_program(
    default: Sequence[str], argv: Sequence[str] | None = None, orig: Sequence[str] | None = None
) -> tuple[str, ...]:
    """What started this process, up to its first argument, without a launcher: `ostro`,
    `python3 train.py`, `python -m ostro`; `default` where it was something else, such as
    a notebook.
    """
    argv = sys.argv if argv is None else argv
    orig = sys.orig_argv if orig is None else orig
    head = list(orig[: len(orig) - len(argv) + 1])
    name = Path(argv[0]).name if argv else ""
    is_ours = bool(head) and (head[-1] == "ostro" or head[-1].startswith("ostro."))
    if is_ours and head[-2:-1] == ["-m"]:
        return _python(head[0]), "-m", head[-1]
    if not head or head[-1] != argv[0] or name != Path(default[-1]).name:
        return _found(tuple(default))
    if name == "ostro":
        on_path = shutil.which(name)
        return (name,) if on_path and os.path.samefile(on_path, argv[0]) else (argv[0],)
    return _python(head[0]), argv[0]


def _found(default: tuple[str, ...]) -> tuple[str, ...]:
    """The default, with an interpreter that is there."""
    if default == ("ostro",):
        return default if shutil.which("ostro") else (sys.executable, "-m", "ostro")
    return (_python(sys.executable, default[0]), *default[1:])


def _python(name: str, preferred: str = "python") -> str:
    """The interpreter as it was typed; launchers give its whole path, where a name may do."""
    if not os.path.isabs(name):
        return name
    for short in dict.fromkeys([preferred, "python", "python3"]):
        found = shutil.which(short)
        if found and os.path.dirname(found) == os.path.dirname(sys.executable):
            return short
    return name


def launched(program: Sequence[str], environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
    """The program as its launcher starts it: torchrun, deepspeed, srun, mpirun, or nobody."""
    if STARTED_AS in environ:
        return tuple(shlex.split(environ[STARTED_AS]))
    rank_info = find_rank_info(environ)
    num_local = rank_info.num_local or rank_info.num_ranks
    if rank_info.launcher == "torchrun" and "TORCHELASTIC_RUN_ID" in environ:
        return ("torchrun", *_torchrun(num_local, environ), *_script(program, "--no_python", "-m"))
    if rank_info.launcher == "torchrun" and "CROSS_SIZE" in environ:
        count = f"--num_gpus={environ.get('LOCAL_SIZE', num_local)}"
        return ("deepspeed", count, *_script(program, "--no_python", "--module"))
    if rank_info.launcher == "SLURM":
        num_nodes = len(dict.fromkeys(rank_info.hosts))
        nodes = [f"--nodes={num_nodes}"] if num_nodes > 1 else []
        return ("srun", *nodes, f"--ntasks={rank_info.num_ranks}", *program)
    if rank_info.launcher == "MPI":
        return ("mpirun", "-n", str(rank_info.num_ranks), *program)
    return tuple(program)


def _torchrun(num_local: int, environ: Mapping[str, str]) -> list[str]:
    words = [f"--nproc_per_node={num_local}"]
    restarts = environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    words += [f"--max_restarts={restarts}"] if restarts != "0" else []
    num_nodes = environ.get("GROUP_WORLD_SIZE", "1")
    if num_nodes == "1":
        return [*words, "--standalone"]
    words += [f"--nnodes={num_nodes}", f"--node_rank={environ.get('GROUP_RANK', '0')}"]
    address, port = environ.get("MASTER_ADDR", "localhost"), environ.get("MASTER_PORT", "29500")
    return [*words, f"--master_addr={address}", f"--master_port={port}"]


def _script(program: Sequence[str], no_python: str, module: str) -> list[str]:
    """A program as a launcher names it that brings its own interpreter."""
    if tuple(program[-2:-1]) == ("-m",):
        return [module, program[-1]]
    return [program[-1]] if program[-1].endswith(".py") else [no_python, *program]


@dataclass(frozen=True)
class RunFacts:
    """What commands to type next have to know of a run."""

    run_id: str
    config_path: str
    """Its resolved configuration; running it again resumes the run."""
    checkpoints: str
    """The folder of its checkpoints."""
    never_loads: bool = False
    """Whether it was told to load no checkpoint."""
    imports: tuple[str, ...] = ()
    """Modules of the user's own, which a command that reads a checkpoint has to be told of."""
    is_complete: bool = True
    """Whether the resolved configuration holds every value; credentials are left out of it."""


class Dialect(ABC):
    """How one command line says things: commands to type, and names of settings."""

    @abstractmethod
    def again(self, run: RunFacts) -> CommandLine:
        """Start the run once more: it has saved nothing yet."""

    @abstractmethod
    def resume(self, run: RunFacts) -> CommandLine:
        """Resume the run from its newest checkpoint."""

    @abstractmethod
    def train_on(self, run: RunFacts, num_steps: int, epoch: int) -> CommandLine:
        """Resume a finished run up to so many steps, and passes over the data unless 0."""

    @abstractmethod
    def sample(self, run: RunFacts, prompt: str) -> CommandLine:
        """Text from the run's newest checkpoint."""

    def spoken(self, text: str) -> str:
        """A message with this command line's names in place of the native ones."""
        return text


class NativeDialect(Dialect):
    """`ostro train`."""

    def __init__(self, words: Sequence[str] | None = None):
        """`words`: what was typed after `ostro train`; None: the run was started from Python."""
        self._words = words
        self._ostro = typed_program(["ostro"])

    def again(self, run: RunFacts) -> CommandLine:
        """The resolved configuration keeps the run's id, so what was built so far counts."""
        program = (*launched(self._ostro), "train")
        if self._words is None or run.is_complete:
            return CommandLine(program, ("--config_path", run.config_path))
        return CommandLine(program, tuple(self._words)).flag("trainer.id", run.run_id)

    def resume(self, run: RunFacts) -> CommandLine:
        """The same, and a run that was to load nothing is told to."""
        command = self.again(run)
        return command.flag("trainer.load_checkpoint", "true") if run.never_loads else command

    def train_on(self, run: RunFacts, num_steps: int, epoch: int) -> CommandLine:
        """The resolved configuration holds the steps that `epoch` came to: both have to grow."""
        command = self.resume(run)
        command = command.flag("epoch", epoch) if epoch else command
        return command.flag("trainer.num_train_steps", num_steps)

    def sample(self, run: RunFacts, prompt: str) -> CommandLine:
        """`ostro sample`, in one process."""
        words = ("--checkpoint", run.checkpoints, "--prompt", prompt)
        own = [word for module in run.imports for word in ("--imports", module)]
        return CommandLine((*self._ostro, "sample"), (*words, *own))

    def why(self, run: RunFacts, step: int) -> CommandLine:
        """`ostro why`: the documents of a batch, and the loss of each."""
        words = ("--step", str(step), "--config_path", run.config_path)
        return CommandLine((*self._ostro, "why"), words)


class Names:
    """Native names of settings, and those of another command line for them."""

    def __init__(self, names: Mapping[str, str]):
        """`names`: dotted native path -> the other name."""
        self._names: dict[str, str] = {}
        for path, name in names.items():
            parts = path.split(".")
            for start in range(len(parts)):
                short = ".".join(parts[start:])
                # One plain word, as `seed` or `dropout`, may just be English.
                if "_" in short or "." in short:
                    self._names.setdefault(short, name)
        longest_first = sorted(self._names, key=len, reverse=True)
        known = "|".join(map(re.escape, longest_first)) or r"(?!)"
        # What is to be typed stays native: `--trainer.resume_policy '{model.seq_len: warn}'`.
        typed = r"--[\w.]+ '[^']*'"
        self._native = re.compile(rf"{typed}|(?<![\w./-])(?:{known})(?![\w/]|\.\w)")

    def spoken(self, text: str) -> str:
        """`text` with the other names; an origin does not repeat the name that it belongs to."""
        lines = self._native.sub(lambda m: self._names.get(m[0], m[0]), text).splitlines()
        return "\n".join(_without_echo(line) for line in lines)


def _without_echo(line: str) -> str:
    name = re.match(r"\s*(?:\w+: )*([\w.]+)(?::| =) ", line)
    return line.replace(f"({name[1]}, ", "(") if name else line
