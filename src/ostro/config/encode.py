"""Config objects to plain values and YAML that loads back to equal objects."""

import re
from dataclasses import is_dataclass
from datetime import timedelta
from typing import Any

import draccus
import yaml

from ostro.config.fields import choice_name, settings
from ostro.core.redaction import redacted
from ostro.core.units import format_duration

_PLAIN = re.compile(r"[A-Za-z_/][\w./-]*|(\d+[dhms])+")
_WORDS = {"true", "false", "yes", "no", "on", "off", "null", "none", "inf", "nan", "infinity"}


def encode(config: Any) -> Any:
    """The configuration as plain dicts, lists and scalars, each choice with its `type`."""
    if type(config) in (type(None), bool, int, float, str):
        return config
    if isinstance(config, timedelta):
        return format_duration(config)
    if hasattr(config, "from_text"):
        return str(config)
    if isinstance(config, dict):
        return {key: encode(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [encode(value) for value in config]
    if is_dataclass(config):
        name = choice_name(type(config))
        head = {} if name is None else {"type": name}
        names = [item.name for item in settings(type(config))]
        return {**head, **{name: encode(getattr(config, name)) for name in names}}
    return draccus.encode(config)  # paths, enumerations, and whatever a user taught draccus


def public(config: Any) -> Any:
    """The same without credentials: what may be printed, saved and sent to trackers."""
    return redacted(encode(config))


def dump_yaml(config: Any) -> str:
    """The configuration as YAML, without credentials. Text in doubt is quoted."""
    return yaml.dump(
        public(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1_000_000
    )


class _Dumper(yaml.SafeDumper):
    """Quotes text in doubt and writes shared values out in full."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    plain = _PLAIN.fullmatch(text) and text.isascii() and text.lower() not in _WORDS
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if plain else '"')


def _represent_list(dumper: yaml.SafeDumper, items: list) -> yaml.Node:
    """In one line, unless there is more below."""
    flow = not any(isinstance(item, (dict, list)) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=flow)


_Dumper.add_representer(list, _represent_list)
_Dumper.add_representer(str, _represent_text)
