"""`ostro config translate`: another program's configuration as a native one."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ostro.cli.arguments import Parser, load_run
from ostro.cli.gpt3 import load_gpt3
from ostro.cli.nanogpt import load_nanogpt
from ostro.config import encode
from ostro.core.errors import ConfigError
from ostro.lm_config import TrainLmConfig


def translate(argv: list[str]) -> None:
    """`ostro config translate --from nanogpt|gpt3|levanter FILE ...`"""
    about = "Write a configuration of another program as a native one, and say what became of it."
    parser = Parser("config translate", about, settings=None)
    parser.add_argument("--from", dest="source", choices=["nanogpt", "gpt3", "levanter"])
    parser.add_argument("--output", metavar="FILE", help="write there instead of printing")
    parser.add_argument("files", nargs="+", metavar="FILE", help="gpt3: model file, training file")
    options, flags = parser.parse(argv)
    if options.source is None:
        raise ConfigError("ostro config translate - give --from nanogpt, gpt3 or levanter")
    try:
        config, lines = _read(options.source, options.files, flags)
    except ConfigError as error:
        raise ConfigError(f"refused:\n{error}") from error
    print("\n".join(lines), file=sys.stderr)
    text = yaml.safe_dump(changes(config), sort_keys=False, allow_unicode=True)
    if options.output:
        Path(options.output).write_text(text, encoding="utf-8")
        print(f"wrote {options.output}", file=sys.stderr)
    else:
        print(text, end="")


def _read(source: str, files: list[str], flags: Sequence[str]) -> tuple[TrainLmConfig, list[str]]:
    if source == "levanter":
        loaded = load_run(files[0], flags)  # it prints what was renamed
        kept = [path for path, origin in loaded.origins.items() if origin != "default"]
        return loaded.config, [f"{path}: kept under this name" for path in kept]
    if source == "nanogpt":
        whole, made = load_nanogpt([*files, *flags])
    else:
        training = ["--training_config", files[1]] if len(files) > 1 else []
        whole, made, _ = load_gpt3(["--config", files[0], *training, *flags])
    return whole.config, made.report()


def changes(config: TrainLmConfig) -> dict[str, Any]:
    """The settings that differ from the defaults, as plain values."""
    return _differences(encode(config), encode(TrainLmConfig()))


def _differences(value: Any, default: Any) -> Any:
    found = {}
    for key, child in value.items():
        base = default.get(key)
        if child == base and key != "type":
            continue
        both = isinstance(child, dict) and isinstance(base, dict)
        same_type = both and child.get("type") == base.get("type")
        found[key] = _differences(child, base) if both and same_type and base else child
    return found
