"""What a run says: to a file, and to the terminal, also while a progress bar stands there."""

import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ostro.core.redaction import redact

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
    to_file = _FileHandler(path, encoding="utf-8", errors="backslashreplace")
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


def folder_fault(folder: Path) -> str:
    """Why no file can be written in a folder, which is made if need be; empty where one can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


class _FileHandler(logging.FileHandler):
    """Says once that the file cannot be written to, and tries again with every line."""

    _is_failing = False

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:  # when it is opened again
            self.handleError(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exception()
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        self._let_go()  # of the lines that it holds back
        if not self._is_failing:
            self._is_failing = True
            log.warning("%s cannot be written to: %s; the run goes on", self.baseFilename, error)

    def close(self) -> None:
        self._let_go()
        super().close()

    def _let_go(self) -> None:
        stream, self.stream = self.stream, None  # type: ignore[assignment]
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()


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
