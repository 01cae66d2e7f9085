"""Native settings gathered from another dialect's, each with the place it came from."""

from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from ostro.config import Loaded
from ostro.config.nodes import Mapping, from_plain, mapping_at


@dataclass
class Translation:
    """What a configuration in another dialect becomes, and what was done with each key."""

    loaded: Loaded[Any]
    """The dialect's own configuration."""
    layer: Mapping = field(default_factory=lambda: Mapping({}, "translated"))
    """The native settings, for `ostro.config.load`."""
    mapped: dict[str, list[str]] = field(default_factory=dict)
    """Key of the dialect -> native settings that it decides."""
    ignored: dict[str, str] = field(default_factory=dict)
    """Key of the dialect -> why it has no effect."""
    notices: list[str] = field(default_factory=list)
    """What the user should know."""
    files: dict[str, str] = field(default_factory=dict)
    """Flag -> the file that was read for it, typed or not."""

    def is_default(self, key: str, default_file: str = "") -> bool:
        """Whether nobody typed this key: it stands in a file of that name or nowhere."""
        origin = self.loaded.origins.get(key, "default")
        return origin == "default" or Path(origin.rpartition(":")[0]).name == default_file

    def set(self, path: str, value: Any, *keys: str) -> None:
        """A native setting, decided by these keys of the dialect (none: by the dialect itself)."""
        origins = [f"{key}, {self.loaded.origins.get(key, 'default')}" for key in keys]
        origin = "; ".join(origins) or "this command line"
        *parents, name = path.split(".")
        mapping_at(self.layer, parents, origin).items[name] = from_plain(value, origin)
        for key in keys:
            self.mapped.setdefault(key, []).append(path)

    def report(self) -> list[str]:
        """Lines that say what became of every key."""
        lines = [f"{key} -> {', '.join(paths)}" for key, paths in self.mapped.items()]
        lines += [f"{key}: ignored, {why}" for key, why in self.ignored.items()]
        return lines + [f"note: {notice}" for notice in self.notices]


def ratio(part: float, whole: float) -> float:
    """`part / whole` as a person would write it: 6e-5 / 6e-4 is 0.1."""
    return float(Decimal(repr(part)) / Decimal(repr(whole))) if whole else 0.0
