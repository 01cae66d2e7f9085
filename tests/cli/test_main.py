"""The commands are imported when they are asked for; what needs none of them is quick."""

import importlib
import resource
import subprocess
import sys

import pytest

from ostro import __version__
from ostro.cli.main import _USAGE, COMMANDS

PROGRAM = """
import sys
sys.argv = ["ostro", *sys.argv[1:]]
try:
    import runpy; runpy.run_module("ostro", run_name="__main__")
except SystemExit as stop:
    print(stop.code, "torch" in sys.modules, "numpy" in sys.modules)
"""


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["help"], ["--version"], []])
def test_answers_that_need_no_torch(words):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", PROGRAM, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    *text, last = done.stdout.splitlines()
    assert last == f"{0 if words else 2} False False", done.stderr
    assert text[0] == (f"ostro {__version__}" if words == ["--version"] else text[0])
    assert text[0].startswith("ostro " if words == ["--version"] else "usage: ostro <command>")
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert seconds < 1.0, seconds  # 0.5 where cores are free


@pytest.mark.parametrize("where", COMMANDS.values())
def test_every_command_is_where_the_table_says(where):
    module, _, name = where.partition(":")
    assert callable(getattr(importlib.import_module(module), name))


@pytest.mark.parametrize("name", COMMANDS)
def test_the_usage_names_every_command(name):
    assert f"\n  {name}" in _USAGE
