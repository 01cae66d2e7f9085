"""A program of your own whose settings come from YAML files and flags."""

from dataclasses import dataclass, field
from datetime import timedelta

from ostro.config import main


@dataclass(frozen=True)
class PauseConfig:
    length: timedelta = timedelta(seconds=1)
    """How long to wait between two greetings."""


@dataclass(frozen=True)
class ProgramConfig:
    greeting: str = "hello"
    """What to say."""
    times: int = 1
    """How often to say it."""
    pause: PauseConfig = field(default_factory=PauseConfig)
    """What happens in between."""


def run(config: ProgramConfig) -> None:
    for _ in range(config.times):
        print(config.greeting, config.pause.length)


if __name__ == "__main__":
    main(run)()
