"""Weights & Biases."""

import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any, Literal

import yaml

from ostro.core.errors import Problem, did_you_mean
from ostro.core.redaction import local_path, redact
from ostro.tracker.tracker import RunInfo, Tracker, TrackerConfig

logger = logging.getLogger(__name__)

_INIT_SECONDS = 60
_FINISH_SECONDS = 300
_DUMP_VARIABLES = ("TORCH_TRACE", "TORCH_COMPILE_DEBUG_DIR")


@TrackerConfig.register_subclass("wandb")
@dataclass(frozen=True)
class WandbConfig(TrackerConfig):
    """Weights & Biases. Without a login, or if the server cannot be reached, the run is kept
    offline in the folder `wandb/`; `wandb sync` uploads it later.
    """

    entity: str | None = None
    """User or team; null = your default one."""
    project: str | None = None
    """Project; null = wandb's default."""
    name: str | None = None
    """Name of the run; null = wandb makes one up."""
    tags: list[str] = field(default_factory=list)
    """Tags of the run."""
    id: str | None = None
    """Unique id of the run; null = the run id."""
    group: str | None = None
    """Group of the run."""
    mode: Literal["online", "offline", "disabled"] | None = None
    """null = wandb's own choice (WANDB_MODE), and offline without a login."""
    resume: bool | str | None = None
    """allow, must, never, auto, true or false, as in `wandb.init`; null = left to wandb, and
    allow when the run goes on from a checkpoint."""
    save_code: bool | str = True
    """Upload the files that git tracks: true, in the repository of the main script; a path, in
    that folder."""
    save_compile_dumps: bool = False
    """Upload, at the end, the compiler output in the folder that the environment variable
    TORCH_TRACE or TORCH_COMPILE_DEBUG_DIR names."""

    def problems(self) -> Iterator[Problem]:
        """wandb itself would only complain once the run has started."""
        known = ("allow", "must", "never", "auto")
        if isinstance(self.resume, str) and self.resume not in known:
            rule = f"must be true, false, null or one of {', '.join(known)}"
            yield Problem("resume", rule, did_you_mean(self.resume, known))

    def build(self, run: RunInfo) -> Tracker:
        return WandbTracker(self, run)


class WandbTracker(Tracker):
    """One wandb run."""

    name = "wandb"

    def __init__(self, config: WandbConfig, run: RunInfo):
        self._config = config
        self._run = _init(config, run)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "config.yaml")
            path.write_text(yaml.safe_dump(run.config, sort_keys=False), encoding="utf-8")
            self._run.log_artifact(str(path), name="config.yaml", type="config")
        if config.save_code:
            self._save_code()
        if config.save_compile_dumps and not _dump_folder():
            logger.warning(
                "save_compile_dumps: the compiler writes nothing unless the environment variable "
                "%s names a folder, before the run starts",
                " or ".join(_DUMP_VARIABLES),
            )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def log_summary(self, values: Mapping[str, Any]) -> None:
        self._run.summary.update(dict(values))

    def log_text(self, name: str, text: str, step: int) -> None:
        import wandb

        self._run.log({name: wandb.Html(f"<pre>{escape(text)}</pre>", inject=False)}, step=step)

    def finish(self) -> None:
        folder = _dump_folder() if self._config.save_compile_dumps else ""
        try:
            if folder and Path(folder).is_dir():
                name = f"compile-dumps-{self._run.id}"
                self._run.log_artifact(folder, name=name, type="compile_dumps")
        finally:
            self._run.finish()

    def state(self) -> dict[str, Any]:
        return {"id": self._run.id}

    def _save_code(self) -> None:
        import wandb

        setting = self._config.save_code
        folder = code_folder() if setting is True else Path(local_path(str(setting))).expanduser()
        if folder is None:
            logger.info("save_code: the main script is in no git repository, no code is uploaded")
            return
        artifact = wandb.Artifact(f"code-{self._run.id}", type="code")
        for name in tracked_files(folder):
            artifact.add_file(str(folder / name), name=name)
        self._run.log_artifact(artifact)


def _init(config: WandbConfig, run: RunInfo) -> Any:
    """`wandb.init` with what is set, nothing else; offline where online fails."""
    fields = ("entity", "project", "name", "group", "mode", "resume")
    given: dict[str, Any] = {name: getattr(config, name) for name in fields}
    given["tags"] = list(config.tags) or None
    if run.resume and config.resume is None:
        given["resume"] = "allow"  # without it wandb starts the run of this id anew
    given = {name: value for name, value in given.items() if value is not None}
    given |= {"id": config.id or run.id, "config": run.config, "settings": _settings()}

    with _public_arguments():
        return _started(given)


@contextmanager
def _public_arguments() -> Iterator[None]:
    """wandb uploads the command line: let it find one without credentials."""
    own = sys.argv
    sys.argv = [redact(word) for word in own]
    try:
        yield
    finally:
        sys.argv = own


def _started(given: dict[str, Any]) -> Any:
    import wandb

    settings = wandb.setup().settings
    if "mode" not in given and settings.mode == "online" and not _has_login(settings):
        logger.warning("no wandb login (`wandb login` makes one): the run is tracked offline")
        given["mode"] = "offline"
    try:
        return wandb.init(**given)
    except wandb.Error as error:
        if given.get("mode") in ("offline", "disabled"):
            raise
        logger.warning("wandb cannot start online (%s): the run is tracked offline", error)
        return wandb.init(**given | {"mode": "offline"})


def _settings() -> dict[str, int]:
    """Bounds on how long wandb may hold up the run, where the user's environment sets none."""
    import wandb

    bounds = {"init_timeout": _INIT_SECONDS, "finish_timeout": _FINISH_SECONDS}
    known = getattr(wandb.Settings, "model_fields", ())  # older versions have no finish_timeout
    return {
        name: seconds
        for name, seconds in bounds.items()
        if name in known and f"WANDB_{name.upper()}" not in os.environ
    }


def _has_login(settings: Any) -> bool:
    from requests.utils import get_netrc_auth  # as wandb itself does

    keys = (os.environ.get("WANDB_API_KEY"), os.environ.get("WANDB_IDENTITY_TOKEN_FILE"))
    servers = (settings.base_url, "https://api.wandb.ai")
    return any((*keys, settings.api_key)) or any(map(get_netrc_auth, servers))


def _dump_folder() -> str:
    """The folder that the compiler was told to write to, or nothing."""
    return next(filter(None, (os.environ.get(variable) for variable in _DUMP_VARIABLES)), "")


def code_folder() -> Path | None:
    """The root of the git repository of the main script, else of the working directory."""
    script = getattr(sys.modules.get("__main__"), "__file__", None)
    for folder in ([Path(script).resolve().parent] if script else []) + [Path.cwd()]:
        root = _git(folder, "rev-parse", "--show-toplevel")
        if root is not None:
            return Path(root.rstrip("\n"))
    return None


def tracked_files(folder: Path) -> list[str]:
    """Files that git tracks below the folder; all files where there is no repository."""
    listing = _git(folder, "ls-files", "-z")
    if listing is not None:
        names = listing.split("\0")
    else:
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))]
    return [name for name in names if name and (folder / name).is_file()]


def _git(folder: Path, *command: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *command], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return os.fsdecode(done.stdout)
