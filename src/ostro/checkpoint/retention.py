"""Which checkpoints have to go so that the rest takes no more room than allowed: values only."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A complete checkpoint, as far as keeping or deleting it is concerned."""

    path: str
    step: int
    bytes: int
    timestamp: float
    """When it was committed, in seconds since 1970."""
    is_temporary: bool = False
    is_best: bool = False
    """An evaluation improved when it was saved: the newest such one has the lowest loss."""
    run_id: str = ""


def total_bytes(entries: Sequence[Entry]) -> int:
    """The room they take together."""
    return sum(entry.bytes for entry in entries)


def untouchable(entries: Sequence[Entry]) -> list[Entry]:
    """The newest and the best one, which are never deleted."""
    by_age = sorted(entries, key=lambda entry: (entry.timestamp, entry.step))
    best = [entry for entry in by_age if entry.is_best]
    return [*by_age[-1:], *best[-1:]]


def to_delete(entries: Sequence[Entry], budget: int, next_step: int | None = None) -> list[Entry]:
    """What to delete, first things first, until the rest takes at most `budget` bytes.

    Temporary ones go first, the oldest before the others. Then permanent ones, each time the one
    whose two neighbours have the fewest steps between them, the older of equals: what stays lies
    evenly over the run. `next_step`, about to be saved, is a neighbour too; before the first lies
    step 0. Where even that is not enough, all but the newest and the best are in the list.
    """
    safe, rest = untouchable(entries), sorted(entries, key=lambda entry: entry.step)
    doomed: list[Entry] = []
    while total_bytes(rest) > budget:
        deletable = [entry for entry in rest if entry not in safe]
        if not deletable:
            break
        temporary = [entry for entry in deletable if entry.is_temporary]
        if temporary:
            victim = min(temporary, key=lambda entry: (entry.timestamp, entry.step))
        else:
            steps = [0, *(entry.step for entry in rest)]
            steps.append(steps[-1] if next_step is None else next_step)
            gaps = {entry: steps[i + 2] - steps[i] for i, entry in enumerate(rest)}
            victim = min(deletable, key=lambda entry: (gaps[entry], entry.step))
        rest.remove(victim)
        doomed.append(victim)
    return doomed


def to_prune(
    entries: Sequence[Entry],
    *,
    keep_every: int | None = None,
    keep_last: int | None = None,
    keep_bytes: int | None = None,
) -> list[Entry]:
    """What to delete of the checkpoints of one run to keep only what was asked for.

    Every so many steps, and the last so many by time; then within so many bytes. The newest and
    the best stay whatever is asked.
    """
    rest = list(entries)
    if keep_every is not None or keep_last is not None:
        by_age = sorted(entries, key=lambda entry: (entry.timestamp, entry.step), reverse=True)
        kept = [*untouchable(entries), *by_age[: keep_last or 0]]
        if keep_every is not None:
            kept += [e for e in entries if e.step % keep_every == 0 and not e.is_temporary]
        rest = [entry for entry in entries if entry in kept]
    if keep_bytes is not None:
        doomed = to_delete(rest, keep_bytes)
        rest = [entry for entry in rest if entry not in doomed]
    return [entry for entry in entries if entry not in rest]


def planned_deletions(
    steps: Sequence[int], size: int, budget: int
) -> Iterator[tuple[int, list[int]]]:
    """Before which of the permanent `steps`, of `size` bytes each, which ones will be deleted."""
    entries: list[Entry] = []
    for step in steps:
        doomed = to_delete(entries, budget - size, step)
        if doomed:
            yield step, [entry.step for entry in doomed]
        entries = [entry for entry in entries if entry not in doomed]
        entries.append(Entry(str(step), step, size, float(step)))
