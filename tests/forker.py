"""A process that has imported ostro and forks for each command: tests need not import it again.

It reads one JSON object a line: words (after `ostro`, or `python SCRIPT` and more), folder,
environment, and the files for standard output and error; it answers with the process that it
began, and with the exit code of the one that ended.
"""

import json
import os
import runpy
import sys

import ostro.cli.main as program


def run(order: dict) -> None:
    """In the child: what `python -m ostro.cli.main WORDS` does, or `python SCRIPT WORDS`."""
    os.setsid()
    for descriptor, name in ((0, os.devnull), (1, order["out"]), (2, order["err"])):
        flags = os.O_RDONLY if descriptor == 0 else os.O_WRONLY | os.O_CREAT
        os.dup2(os.open(name, flags, 0o600), descriptor)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.path[:1] = [order["cwd"], *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    script = order["words"][1] if order["words"][:1] in (["python"], ["python3"]) else None
    sys.argv = [script or program.__file__, *order["words"][2 if script else 0 :]]
    sys.orig_argv = order["words"] if script else ["python", *sys.argv]
    code = 1
    try:
        if script is None:
            program.main()
        else:
            sys.path[0] = os.path.dirname(os.path.abspath(script))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    """Serve until standard input ends."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            run(json.loads(line))
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
