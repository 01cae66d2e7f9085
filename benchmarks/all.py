"""Every benchmark, one after the other: figures as JSON, tables into the documentation.

    python -m benchmarks.all [--quick] [--only NAME ...]

Writes `benchmarks/results/<date>.json`, the machine described in it, and the tables between the
markers of `docs/performance.md`; both after every benchmark, so that one that fails costs no other.
Each runs in a process of its own. With `--only` the other figures of the day are kept.
What was found to be the peers' best settings is kept in `benchmarks/results/picks.json`; delete it
to find them anew.
"""

import argparse
import importlib
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from benchmarks import common

MODULES = ("train_step", "where", "agreement", "first_step", "loader", "scaling", "saving",
           "tokenising", "generation", "muon")  # fmt: skip
ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "performance.md"
OPTIONS = {"train_step": ["--picks", str(RESULTS / "picks.json")]}


def run(name: str, rounds: int) -> dict[str, Any] | None:
    """The figures of a benchmark; None where it failed."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "result.json")
        command = [sys.executable, "-m", f"benchmarks.{name}", "--rounds", str(rounds)]
        command += ["--json", str(out), *OPTIONS.get(name, [])]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        if done.returncode:
            common.note(f"{name} FAILED with code {done.returncode}")
            return None
        return json.loads(out.read_text())


def tables(found: Mapping[str, Any]) -> dict[str, str]:
    """What to show, by marker."""
    shown = {"machine": f"{found['date']}: {common.show_machine(found['machine'])}."}
    for name in MODULES:
        if name in found:
            shown[name] = importlib.import_module(f"benchmarks.{name}").show(found[name])
    return shown


def rewritten(page: str, shown: Mapping[str, str]) -> str:
    """The page with what stands between `<!-- begin NAME -->` and `<!-- end NAME -->` replaced."""
    for name, text in shown.items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
        if not pattern.search(page):
            raise SystemExit(f"{PAGE.name} has no markers for {name}")
        page = pattern.sub(lambda _, t=text, b=begin, e=end: f"{b}\n{t}\n{e}", page)
    return page


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two rounds of each, not five")
    parser.add_argument("--only", nargs="+", choices=MODULES, default=MODULES)
    options = parser.parse_args()
    today = date.today().isoformat()
    file = RESULTS / f"{today}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    found |= {"date": today, "machine": common.machine()}
    RESULTS.mkdir(exist_ok=True)
    for name in options.only:
        if importlib.util.find_spec(f"benchmarks.{name}") is None:
            continue
        common.note(f"== {name}")
        if (result := run(name, rounds=2 if options.quick else 5)) is not None:
            found[name] = result
            file.write_text(json.dumps(found, indent=1) + "\n")
            PAGE.write_text(rewritten(PAGE.read_text(), tables(found)))


if __name__ == "__main__":
    main()
