"""How each kind of fault is staged, and what must come of it."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from ostro.core.errors import ConfigError, Problem
from ostro.data.sources.source import UrlsSource
from ostro.inspect.chaos.faults import DAMAGES, SIGNALS, Fault, Strike
from ostro.inspect.children import Orders, strike
from ostro.lm_config import TrainLmConfig, replace_trainer
from ostro.tracker import JsonLoggerConfig, NoopConfig, Tracker
from ostro.trainer import Trainer
from ostro.trainer.spikes import RecoverConfig, StepRange

Change = Callable[[TrainLmConfig], TrainLmConfig]

_BROKEN_LINES = (
    '{"text": "no end',
    '{"txt": "another key"}',
    '{"text": 3}',
    "[]",
    "null",
    "\x00\x00",
    "plain text",
    '{"text": "\ud800"}',
)


def unchanged(config: TrainLmConfig) -> TrainLmConfig:
    """The same settings."""
    return config


@dataclass(frozen=True)
class Scenario:
    """A run that is hit, what it may end with, and what its result has to equal."""

    hit: TrainLmConfig
    again: TrainLmConfig  # what is started once the cause is gone
    orders: list[Orders]  # one for each process
    codes: tuple[tuple[int, ...], ...]  # what its processes may end with
    marker: str  # what its log must say: the fault has happened
    name: str = ""  # of the undisturbed run, where that is another one
    like: Change = unchanged  # that run's settings: those where the user has data left out
    ignored: range = range(0)  # steps whose figures are of what was left out


def stage(fault: Fault, config: TrainLmConfig, folder: Path) -> Scenario:
    """The scenario of a fault on a run whose files go to `folder`."""
    kind = fault.kind
    if kind == "NaN gradient":
        return _nan_gradient(fault, config)
    if kind == "bad record":
        return _bad_record(fault, config, folder)
    if kind == "unreachable tracker":
        hit = replace_trainer(config, tracker=[JsonLoggerConfig(), NoopConfig()])
        orders = [Orders(wrapper=lambda: _unreachable(fault))]
        return Scenario(hit, hit, orders, ((0,),), "tracker noop failed")
    acts = dataclasses.replace(fault, kind="kill -9") if kind in DAMAGES else fault
    codes: dict[str, tuple[tuple[int, ...], ...]] = {
        "SIGTERM": ((143,), (0,)),  # 0: it came too late to stop anything
        "full disk": ((0,), (2,)),  # 2: the last save of the run failed
        "slow rank": ((0, 0),),
        "dead rank": ((1, -9),),
        "stalled rank": ((1, 1),),
    }
    expected = codes.get(kind, ((-9,),))
    if kind == "SIGTERM" and fault.where == "import":
        expected = ((143,), (-15,))  # before our handlers are there
    orders = [Orders(Strike(acts, folder / "checkpoints"))]
    if kind.endswith("rank"):
        orders.insert(0, Orders())
    hit = config
    if kind == "stalled rank":
        hit = replace_trainer(config, hang_timeout=timedelta(seconds=2))
    assert kind in (*SIGNALS, *DAMAGES, *codes), f"{kind} has no scenario"
    return Scenario(hit, config, orders, expected, f"doctor: {acts.kind} in ")


def _nan_gradient(fault: Fault, config: TrainLmConfig) -> Scenario:
    """The gradient of one step is not a number; three policies what to do about it."""
    num_steps = config.trainer.num_train_steps
    step = fault.draw.randrange(1, num_steps - 2)

    def spoil(trainer: Trainer) -> None:
        update = trainer.engine.update

        def spoiled(*arguments: object) -> object:
            if trainer.state.step == step and not done:
                done.append(step)
                strike(0, "NaN gradient; complete: none")
                next(p for p in trainer.state.model.parameters()).grad.fill_(math.nan)  # type: ignore
            return update(*arguments)  # type: ignore[arg-type]

        done: list[int] = []
        trainer.engine.update = spoiled  # type: ignore[method-assign]

    orders, marker = [Orders(on_ready=spoil)], "doctor: NaN gradient"
    if fault.where == "stop":
        return Scenario(config, config, orders, ((2,),), marker)
    recover = RecoverConfig(max_rollbacks=1, window=2, batches_before=0)
    skips = fault.where == "skip"
    hit = replace_trainer(config, **{"crash_on_nan": False} if skips else {"recover": recover})
    left_out = StepRange(step, step if skips else step + 1)

    def like(config: TrainLmConfig) -> TrainLmConfig:
        return replace_trainer(config, skip_steps=[left_out])

    ignored = range(left_out.first, left_out.last + 1)
    return Scenario(hit, hit, orders, ((0,),), marker, f"without {left_out}", like, ignored)


def _bad_record(fault: Fault, config: TrainLmConfig, folder: Path) -> Scenario:
    """A broken line in a file of the corpus: the user mends it, or has it left out."""
    source = next(iter(config.data.sources().values()))
    path = Path(source.train_urls[0]) if isinstance(source, UrlsSource) else Path()
    if config.data.configs or path.suffix != ".jsonl" or not path.is_file():
        rule = "bad record needs data.train_urls with a local .jsonl file first"
        raise ConfigError(Problem("--only", rule, "leave it out, or use no --config_path"))
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    broken = folder / path.name
    at = fault.draw.randrange(len(lines) + 1)
    lines.insert(at, fault.draw.choice(_BROKEN_LINES) + "\n")
    broken.write_text("".join(lines), encoding="utf-8", errors="surrogatepass")
    own = dataclasses.replace(config.data, cache_dir=f"{folder}/cache")
    urls = [str(broken), *config.data.train_urls[1:]]
    stops = fault.where == "stop"
    data = dataclasses.replace(
        own, train_urls=urls, on_bad_record="error" if stops else "skip", rebuild_cache=False
    )
    hit = dataclasses.replace(config, data=data)
    again = dataclasses.replace(config, data=own)
    marker = f"{broken}, line {at + 1}" if stops else "left out 1 bad record"
    return Scenario(hit, again, [Orders()], ((2,),) if stops else ((0,),), marker)


@contextlib.contextmanager
def _unreachable(fault: Fault) -> Iterator[None]:
    """In the child: the tracker `noop` stands for a service that cannot be reached."""
    draw = fault.draw

    class Unreachable(Tracker):
        name = "noop"

        def log(self, metrics: Mapping[str, float], step: int) -> None:
            if draw.random() < 0.7:
                raise ConnectionError("the service cannot be reached")

        def finish(self) -> None:
            raise TimeoutError("the service does not answer")

    def start(self: NoopConfig, run: object) -> Tracker:
        if fault.where == "start":
            raise ConnectionError("the service cannot be reached")
        return Unreachable()

    NoopConfig.build = start  # type: ignore[method-assign]
    yield  # the process ends with the run
