"""`python train.py key=value`: nanoGPT's command line."""

import ast
import operator
import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any

from ostro.checkpoint import look
from ostro.checkpoint.single_file import INTERRUPTED, NANOGPT
from ostro.cli.aliases import NATIVE
from ostro.cli.arguments import speaking, start_run
from ostro.cli.recognise import recognising
from ostro.compat.commands import NanoGptDialect
from ostro.compat.nanogpt import checkpoint_file, settings
from ostro.compat.translation import Translation
from ostro.config import Loaded, help_text, load, script_folders
from ostro.config.nodes import Mapping as Layer
from ostro.config.nodes import from_plain
from ostro.core.errors import CheckpointError, ConfigError, Problem, did_you_mean
from ostro.core.redaction import local_path
from ostro.distributed.launchers import find_rank_info
from ostro.io.torch_files import read_file
from ostro.lm_config import TrainLmConfig
from ostro.runtime.commands import CommandLine, grouped, typed_program
from ostro.runtime.signals import Signals

_USAGE = """usage: python train.py [config.yaml | config.py] [key=value ...] [--dry_run] [--help]

Defaults are those of train_config.yaml. Native settings are taken too, as --trainer.id x.
"""
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.Div: operator.truediv, ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip


def train(argv: list[str], signals: Signals) -> None:
    """Train as nanoGPT's `train.py` does."""
    if "-h" in argv or "--help" in argv:
        print(_USAGE)
        print(help_text(settings.NanoGptConfig))
        return
    is_dry = "--dry_run" in argv
    words = [word for word in argv if word != "--dry_run"]
    with recognising(words, "nanogpt"):
        loaded, made = load_nanogpt(words)
    if not is_dry and loaded.origins.get("data.source.dir", "").startswith("dataset, "):
        require_data(made)  # no native setting has named other data
    num_ranks = find_rank_info(os.environ).num_ranks
    notices = [*made.notices, *loaded.notices]
    start_run(
        loaded,
        signals,
        is_dry=is_dry,
        num_devices=num_ranks,
        notices=notices,
        dialect=NanoGptDialect(words, made),
    )


def load_nanogpt(argv: Sequence[str]) -> tuple[Loaded[TrainLmConfig], Translation]:
    """The native configuration of a nanoGPT command line, and how it was translated."""
    files, flags, native = split(argv)
    search = script_folders()
    defaults = [settings.DEFAULT_FILE] if _exists(settings.DEFAULT_FILE, search) else []
    yaml_files = [name for name in files if not name.endswith(".py")]
    layers = [read_python(name, search) for name in files if name.endswith(".py")]
    loaded = load(
        settings.NanoGptConfig, [*defaults, *yaml_files], flags, layers=layers, search=search
    )
    config = loaded.config
    made = settings.translate(loaded, saved_arguments(config))
    words = [part for word in native for part in word.split("=", 1)]
    if ("--optimizer.type", "muon") in pairwise(words):
        made.set("optimizer.type", "muon")  # a type that comes later would drop all of AdamW's
    with speaking(NanoGptDialect(argv, made)):
        whole = load(TrainLmConfig, [], native, layers=[made.layer], aliases=NATIVE, search=search)
    return whole, made


def split_native(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Words as those of the dialect, and native settings: names with a dot or of the top level."""
    top = {field.name for field in fields(TrainLmConfig)}
    own, native = [], []
    for words in grouped(argv):
        name, equals, _ = words[0].partition("=")
        if "." in name and (equals or name.startswith("--")):
            native += [f"--{words[0].removeprefix('--')}", *words[1:]]
        else:
            (native if name.startswith("--") and name[2:] in top else own).extend(words)
    return own, native


def split(argv: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Words as configuration files, settings of nanoGPT as flags, and native settings."""
    own, native = split_native(argv)
    files, flags = [], []
    for word, *value in grouped(own):
        if word.startswith("--"):
            flags += [word, *value]
        elif "=" in word:
            flags.append(f"--{word}")
        elif word.endswith((".yaml", ".yml", ".py")):
            files.append(word)
        else:
            advice = did_you_mean(word, settings.names()) or "`python train.py --help` lists all"
            raise ConfigError(f"{word} - is neither key=value nor a .yaml or .py file - {advice}")
    return files, flags, native


def require_data(made: Translation) -> None:
    """Refuse a `dataset` whose token files are not there, and say what makes them."""
    config = made.loaded.config
    folder, search = Path("data") / config.dataset, script_folders()
    if (folder / "train.bin").exists():
        return
    scripts = [place / folder / "prepare.py" for place in [Path(), *search]]
    script = next((path for path in scripts if path.exists()), None)
    if script is None:
        names = {path.parent.name for place in [Path(), *search]
                 for pattern in ("*/prepare.py", "*/train.bin")
                 for path in (place / "data").glob(pattern)}  # fmt: skip
        known = f"there is data for {', '.join(sorted(names))}" if names else ""
        advice = did_you_mean(config.dataset, names) or known
    else:
        where = () if script.parent == folder else ("--out_dir", str(folder))
        command = CommandLine((typed_program(["python", "train.py"])[0], str(script)), where)
        advice = f"make it with: {command}"
    rule, origin = f"there is no {folder}/train.bin", made.loaded.origins["dataset"]
    raise ConfigError(Problem("dataset", rule, advice, config.dataset, origin))


def read_python(path: str, search: Sequence[Path] = ()) -> Layer:
    """A nanoGPT config file, as data: assignments of literals and arithmetic; never executed.

    It is looked up here and then in `search`.
    """
    places = [folder / path for folder in [Path(), *search]]
    path = str(next((place for place in places if place.exists()), path))
    if not Path(path).exists():
        names = [str(file) for place in places for file in place.parent.glob("*.py")]
        names = [os.path.relpath(name) for name in names]
        looked = f"no such file; looked for {', '.join(map(str, dict.fromkeys(places)))}"
        raise ConfigError(Problem(path, looked, did_you_mean(path, names)))
    try:
        tree = ast.parse(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, SyntaxError, ValueError) as error:
        raise ConfigError(f"{path} - cannot be read: {error}") from error
    values: dict[str, Any] = {}
    layer = Layer({}, path)
    for node in tree.body:
        origin = f"{path}:{node.lineno}"
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue  # a docstring
        target = node.targets[0] if isinstance(node, ast.Assign) else None
        if not isinstance(target, ast.Name) or len(node.targets) > 1:  # type: ignore[attr-defined]
            text = ast.unparse(node).splitlines()[0]
            rule = "only plain assignments are read from a .py file, nothing is executed"
            raise ConfigError(Problem(text, rule, "write key = value, or use YAML", origin=origin))
        values[target.id] = _value(node.value, values, target.id, origin)  # type: ignore[union-attr]
        layer.items[target.id] = from_plain(values[target.id], origin)
    return layer


def _value(node: ast.expr, known: Mapping[str, Any], name: str, origin: str) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float, str)):
        return node.value
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, known, name, origin)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = (_value(side, known, name, origin) for side in (node.left, node.right))
        if isinstance(left, (int, float)) and isinstance(right, (int, float)):
            try:
                return _OPERATORS[type(node.op)](left, right)
            except ZeroDivisionError:
                pass
    rule = "only literals and arithmetic on them are read from a .py file"
    raise ConfigError(Problem(name, rule, "write the value itself", ast.unparse(node), origin))


def saved_arguments(config: settings.NanoGptConfig) -> Mapping[str, Any] | None:
    """The architecture in `out_dir/ckpt.pt`, where the run goes on from it."""
    if config.init_from != "resume":
        return None
    folder = local_path(config.out_dir)
    paths = [Path(folder) / name for name in (NANOGPT, INTERRUPTED)]
    there = [str(path) for path in paths if path.exists()]
    # As the run will choose: by the time and the step in them.
    newest = [path for path in look(folder).newest_first if path in there]
    path = next(iter([*newest, *there]), None)
    if path is None:
        advice = "check out_dir, or start with init_from=scratch"
        raise CheckpointError(f"init_from = resume - there is no {paths[0]} - {advice}")
    content = read_file(Path(path), check=False)
    if not checkpoint_file.NanoGptFormat().fits(content):
        raise CheckpointError(f"{path} - is no checkpoint that nanoGPT wrote: it has no model_args")
    return content["model_args"] | checkpoint_file.own_settings(content, str(path))


def _exists(name: str, folders: Sequence[Path]) -> bool:
    return any((folder / name).exists() for folder in [Path(), *folders])
