"""Settings of other programs that have no counterpart here: which of them may stand in a file.

What cannot change the mathematics is accepted with one notice. What would change it is accepted
with the value that means nothing, such as `fcm_prob: 0`, and refused with any other.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ostro.config import nodes
from ostro.core.errors import Problem


@dataclass(frozen=True)
class Foreign:
    """One row: a setting that another program has and we have not."""

    path: str
    """Its dotted path; `*` stands for any one name."""
    why: str
    """Why it does nothing here, after "has no effect here: "."""
    accepts: tuple[str, ...] = ()
    """The values that may stand there, in lower case; empty for any."""
    advice: str = ""
    """What to do with another value."""

    def fits(self, path: str) -> bool:
        """Whether this row speaks of the setting at a dotted path."""
        own, parts = self.path.split("."), path.split(".")
        return len(own) == len(parts) and all(
            name in ("*", part) for name, part in zip(own, parts, strict=True)
        )


@dataclass
class ForeignSettings:
    """The rows, and which of them a notice has been given for."""

    rows: Sequence[Foreign] = ()
    noticed: set[str] = field(default_factory=set)

    def find(self, path: str) -> Foreign | None:
        """The row of a setting that is not known here, if there is one."""
        return next((row for row in self.rows if row.fits(path)), None)

    def problem(self, row: Foreign, path: str, node: nodes.Node) -> Problem | None:
        """What is wrong with the value, or None where it may be ignored."""
        value = nodes.written(node)
        if not row.accepts or value.lower() in row.accepts or value in nodes.NULLS:
            return None
        return Problem(path, f"must be {row.accepts[0]}: {row.why}", row.advice, value, node.origin)

    def notice(self, row: Foreign, path: str, node: nodes.Node) -> str | None:
        """The line that says that it is ignored: one for each row."""
        if row.path in self.noticed:
            return None
        self.noticed.add(row.path)
        return f"{path} ({node.origin}) has no effect here: {row.why}"
