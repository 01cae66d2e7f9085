"""Where the time of a step goes: `ostro bench` for the configurations of `benchmarks.train_step`.

python -m benchmarks.where [--rounds 5] [--json FILE]
"""

from typing import Any

from benchmarks import common
from benchmarks.ours import CASES, load_case
from ostro.inspect.bench import bench

WITH_OWN_TEXT = tuple(case for case in CASES if case != "gpt2_4x128")
"""The others train on files that have to be fetched first."""


def measure(rounds: int) -> dict[str, Any]:
    """What `ostro bench` finds, by case."""
    return {case: bench(load_case(case), 2, rounds) for case in WITH_OWN_TEXT}


def show(result: dict[str, Any]) -> str:
    """Phases of all cases, and the operators of the first."""
    cases = {name: found for name, found in result.items() if name in WITH_OWN_TEXT}
    rows = []
    for name, found in cases.items():
        seconds = {mode: common.figure(s, 1000) for mode, s in found["seconds"].items()}
        shares = [f"{share:.1%}" for share in found["phases"].values()]
        rows.append([name, seconds["eager"], seconds.get("compiled", ""), *shares])
    phases = list(next(iter(cases.values()))["phases"])
    parts = [common.table(["", "eager, ms a step", "compiled", *phases], rows)]
    for name, found in list(cases.items())[:1]:
        parts.append(f"Operators of {name}, {found['mode']}:")
        lines = [
            [f"`{row['name']}`", f"{row['share']:.1%}", f"{1000 * row['seconds']:.1f}",
             f"{row['calls']:g}"]
            for row in found["operators"]
        ]  # fmt: skip
        parts.append(common.table(["", "share", "ms a step", "calls"], lines))
    return "\n\n".join(parts)


if __name__ == "__main__":
    common.command_line(measure, show, __doc__)
