"""The way errors and signals leave a process: one message, one exit code."""

import atexit
import contextlib
import errno
import gc
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TextIO

from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from ostro.core.errors import OstroError
from ostro.core.redaction import redact
from ostro.distributed.rendezvous import LostRankError, Rendezvous, report_failure
from ostro.runtime.compile_cache import unusable_cache
from ostro.runtime.signals import Interrupted, Signals


def entry_point(command: Callable[[Signals], None], *, debug: bool = False) -> int:
    """Run `command` under signal handlers; turn what it raises into a message and an exit code.

    Meanwhile nothing that Python writes to standard error shows a credential, be it a warning, a
    library's log or the traceback of a thread.
    """
    unusable_cache()  # before anything imports all of torch
    hook, threading.excepthook = threading.excepthook, _thread_failed
    try:
        with contextlib.redirect_stderr(_Redacting(sys.stderr)):
            return _guarded(command, debug)
    finally:
        threading.excepthook = hook


def _thread_failed(failure: threading.ExceptHookArgs) -> None:
    """Print a traceback, unless the thread hands its error on, as TensorBoard's writer does."""
    if getattr(failure.thread, "exception", None) is not failure.exc_value:
        threading.__excepthook__(failure)


def _guarded(command: Callable[[Signals], None], debug: bool) -> int:
    try:
        with Signals() as signals:
            command(signals)
    except Interrupted as stop:
        print(f"ostro: stopped by {stop}; {stop.go_on}".removesuffix("; "), file=sys.stderr)
        gc.freeze()  # or Python looks through all of torch's objects once more, for a second
        return stop.exit_code
    except BrokenPipeError:  # `ostro config show | head`
        sys.stderr.close()  # or Python reports that it could not flush standard output
        return 0
    except Exception as error:
        message = None if debug else _message(error)
        if message is None:
            _record(error)
            if Rendezvous.current is None:
                sys.excepthook = _print_traceback
                raise
        text = message or redact(traceback.format_exc())
        report_failure(text, is_lost=isinstance(error, LostRankError))
        return 1 if message is None else getattr(error, "exit_code", 2)
    return 0


def run_script(command: Callable[[list[str], Signals], None]) -> NoReturn:
    """Run `command` with this process's arguments, and end with its exit code.

    `--debug` is not among them: it shows the traceback of what is otherwise one message.
    """
    words = [word for word in sys.argv[1:] if word != "--debug"]
    leave_after(
        lambda: entry_point(lambda signals: command(words, signals), debug="--debug" in sys.argv)
    )


def leave_after(run: Callable[[], int]) -> NoReturn:
    """End this process with the exit code that `run` returns, in order and in whatever state.

    All that Python does at its end is done, but for taking itself apart. A thread that is in native
    code by then (a batch that is still being read, a callback of a collective) would abort the
    process of a run that has finished well: "terminate called without an active exception".
    """
    code = 1
    try:
        code = run()
    except SystemExit as stop:  # `--help`, and what argparse refuses
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    try:
        threading._shutdown()  # type: ignore[attr-defined] - joins threads that are no daemons
        atexit._run_exitfuncs()
    finally:
        try:  # also where a signal has come meanwhile
            code = _flushed(code)
        finally:
            os._exit(code)


def _flushed(code: int) -> int:
    """Write out what was printed; the exit code, which tells where that cannot be."""
    try:
        sys.stdout.flush()
    except (BrokenPipeError, ValueError):
        pass  # `| head` has closed it
    except OSError as error:
        code = code or 1
        with contextlib.suppress(OSError, ValueError):
            print(f"ostro: error: the output is lost: {error.strerror}", file=sys.stderr)
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    return code


class _Redacting:
    """A text stream that passes on what is written to it, without credentials."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(redact(text))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _record(error: Exception) -> None:
    """Leave the error where torchrun looks for it: it repeats it in its last words."""
    get_error_handler().record_exception(error)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if file and os.path.exists(file):
        with open(file, "r+", encoding="utf-8") as stream:
            report = json.load(stream)
            message, details = report["message"], report["message"]["extraInfo"]
            message["message"] = redact(message["message"])
            details["py_callstack"] = redact(details["py_callstack"])
            stream.seek(0)
            stream.truncate()
            json.dump(report, stream)


def _print_traceback(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """As Python does, without credentials."""
    sys.stderr.write(redact("".join(traceback.format_exception(kind, error, trace))))


def _message(error: Exception) -> str | None:
    """What a user reads of an error that a user can mend; None for any other."""
    if isinstance(error, OstroError):
        return f"ostro: error: {error}"
    kinds = (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT)
    if not isinstance(error, OSError) or error.errno not in kinds:
        return None
    where = f" ({error.filename})" if error.filename else ""
    return (
        f"ostro: error: {error.strerror}{where} - free space or change the permission, or write"
        " elsewhere with trainer.checkpointer.base_path, trainer.log_dir and data.cache_dir"
    )
