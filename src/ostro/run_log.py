"""What a run says: to a file, and to the terminal, also while a progress bar stands there."""

import contextlib
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from ostro.secrets import redact

log = logging.getLogger("ostro")


@contextlib.contextmanager
def logging_to(
    path: Path | None, level: str = "INFO", spoken: Callable[[str], str] = str
) -> Iterator[None]:
    """Send what ostro logs, from `level` up, to `path` and to the terminal, as `spoken` says it.

    Without a path (a rank that is not the first) only errors go to the terminal.
    """
    if path is None:
        with logging_to_terminal("ERROR", spoken):
            yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    to_file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    to_file.setFormatter(_Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_file.addFilter(_saying(spoken))
    log.addHandler(to_file)
    try:
        with logging_to_terminal(level, spoken):
            yield
    finally:
        log.removeHandler(to_file)
        to_file.close()


@contextlib.contextmanager
def logging_to_terminal(level: str = "INFO", spoken: Callable[[str], str] = str) -> Iterator[None]:
    """Print what ostro logs, from `level` up, as `spoken` says it."""
    handler, before = _PrintHandler(), log.level
    handler.addFilter(_saying(spoken))
    log.setLevel(level)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.setLevel(before)
        log.removeHandler(handler)


def _saying(spoken: Callable[[str], str]) -> Callable[[logging.LogRecord], bool]:
    """A filter of a handler that changes the words of a message."""

    def change(record: logging.LogRecord) -> bool:
        record.msg, record.args = spoken(record.getMessage()), None
        return True

    return change


class _Formatter(logging.Formatter):
    """Leaves credentials out, of tracebacks too."""

    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))


class _PrintHandler(logging.Handler):
    """Prints to whatever standard output is now: a progress bar redirects it while it lives.

    Records marked `file_only` are left out: the console tracker has shown them in its own way.
    """

    def filter(self, record: logging.LogRecord) -> bool | logging.LogRecord:
        return not getattr(record, "file_only", False) and super().filter(record)

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(prefix + redact(record.getMessage()), file=sys.stdout, flush=True)
