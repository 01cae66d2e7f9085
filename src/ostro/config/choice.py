"""Registries: `type: name` in a configuration picks the class."""

from collections.abc import Collection
from typing import Any, ClassVar

import draccus


class Choice(draccus.ChoiceRegistry):
    """Base of a registry of config dataclasses; `@Base.register_subclass("name")` adds one.

    A registry is a direct subclass of `Choice`; what it registers is final.
    """

    default_type: ClassVar[str | None] = None
    """The type taken when a configuration names none; None makes `type` required."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if Choice in cls.__bases__:  # draccus would share one table among all our registries
            cls._choice_registry = {}

    @classmethod
    def default_choice_name(cls) -> str | None:
        """What draccus asks for; see `default_type`."""
        return cls.default_type

    @classmethod
    def implied_type(cls, keys: Collection[str]) -> str | None:
        """The type that a mapping with these keys means where it names none; None: the default."""
        return None

    @classmethod
    def from_scalar(cls, text: str) -> dict[str, Any]:
        """The mapping that a bare word stands for: `lr_schedule: cosine` is `{type: cosine}`."""
        return {"type": text}
