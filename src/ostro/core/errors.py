"""The errors a user can cause, and the helper that suggests what was meant.

    OstroError
    ├── ConfigError       a setting is wrong; reports every mistake of a configuration at once
    ├── DataError         a source, a record, a tokenizer or a cache is wrong
    └── CheckpointError   a checkpoint is missing, damaged, or does not fit

Commands print the message of an `OstroError` without a traceback and exit with code 2. It holds
no credentials.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

from ostro.core.redaction import redact


class OstroError(Exception):
    """Something the user can mend. The message says what, where, and what to do."""

    exit_code = 2
    """With which a command ends that raises this."""

    def __str__(self) -> str:
        return redact(super().__str__())


class DataError(OstroError):
    """A data source, a record, a tokenizer or a token cache cannot be used."""


class CheckpointError(OstroError):
    """A checkpoint is missing, damaged, or does not fit this run."""


@dataclass(frozen=True)
class Problem:
    """One mistake in a configuration.

    Config dataclasses yield these from a `problems()` method, with `setting` relative to
    themselves; the configuration layer completes the path, the value and the origin.
    """

    setting: str
    """Dotted path of the setting, relative to the dataclass that yields the problem."""
    rule: str
    """What the value violates, for example `must divide model.hidden_dim = 100`."""
    advice: str = ""
    """What to do about it, for example `did you mean num_heads?`."""
    value: str | None = None
    """The offending value as the user wrote it; None where there is none."""
    origin: str | None = None
    """Where the value came from: `default`, `config/x.yaml:3`, `--model.num_heads`, ..."""

    def __str__(self) -> str:
        value = "" if self.value is None else f" = {self.value}"
        origin = "" if self.origin is None else f" ({self.origin})"
        advice = f" - {self.advice}" if self.advice else ""
        return f"{self.setting}{value}{origin} - {self.rule}{advice}"


def at_least(least: int, config: object, *names: str, advice: str = "") -> Iterator[Problem]:
    """A problem for each of these fields of a configuration that is set and smaller."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < least:
            yield Problem(name, f"must be at least {least}", advice)


def seed_problems(config: object, *names: str) -> Iterator[Problem]:
    """A problem for each of these fields that is no seed: torch takes 64 bits, without a sign."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not 0 <= value < 1 << 64:
            yield Problem(name, "must be between 0 and 2**64 - 1", "any such number will do")


class ConfigError(OstroError):
    """One or more mistakes in a configuration, each a `Problem`."""

    def __init__(self, problems: str | Problem | Sequence[Problem]):
        if isinstance(problems, Problem):
            problems = [problems]
        self.problems: list[Problem] = [] if isinstance(problems, str) else list(problems)
        super().__init__(problems if isinstance(problems, str) else self._format())

    def _format(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        lines = [f"{len(self.problems)} problems in the configuration:"]
        return "\n".join(lines + [f"  {problem}" for problem in self.problems])


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean X?` for the nearest of the known names, or `` when none is near."""
    by_case = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), by_case, n=1, cutoff=0.6)
    return f"did you mean {by_case[matches[0]]}?" if matches else ""
