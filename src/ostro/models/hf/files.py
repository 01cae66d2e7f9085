"""Reading and writing folders as Hugging Face keeps them.

Only safetensors are written; pickles are read by torch's `weights_only` loader alone.
"""

import contextlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ostro.core.errors import CheckpointError
from ostro.core.redaction import local_path
from ostro.data.tokenizer import LibraryTokenizer, tokenizer_from_text
from ostro.io.filesystem import flush_folder
from ostro.io.json_schema import matches_schema, read_object
from ostro.io.safetensors import read_tensors, tensor_pieces
from ostro.io.torch_files import read_file
from ostro.models import LmConfig
from ostro.models.hf.layout import differences, from_hf, refuse, to_hf
from ostro.models.hf.settings import hf_config, lm_config, setting_differences
from ostro.models.hf.tokenizer_files import generation_ids, token_ids, tokenizer_files

_log = logging.getLogger("ostro.models.hf")
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED, _PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
_SHARD = re.compile(r"\w[\w .+=@-]*(/\w[\w .+=@-]*)*")
"""How an index may name files: within its folder."""


def read_hf(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Configuration and weights of a local folder, or of `organisation/name[@revision]` on the hub.

    Nothing but `config.json` and safetensors is fetched. A local folder that has only
    `pytorch_model.bin`, or its shards, is read by torch's loader of plain weights.
    """
    folder = _folder(name, ["config.json", _WEIGHTS, _INDEX])
    config = _json(folder / "config.json")
    if (path := folder / _WEIGHTS).exists():
        return config, _read_weights(path)
    if (path := folder / _INDEX).exists():
        _folder(name, sorted(set(_weight_map(path).values())))
        return config, _read_shards(path)
    if (path := folder / _PICKLED).exists():
        return config, _read_pickled(path)
    if (path := folder / _PICKLED_INDEX).exists():
        return config, _read_shards(path)
    raise CheckpointError(f"{name} - has neither {_WEIGHTS} nor {_INDEX} - give another model")


def _folder(name: str, patterns: list[str]) -> Path:
    path = Path(local_path(name)).expanduser()
    if path.is_dir():
        return path
    repository, _, at = name.partition("@")
    try:
        from huggingface_hub import snapshot_download

        fetched = snapshot_download(repository, revision=at or None, allow_patterns=patterns)
    except Exception as error:  # network, name and access errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{name} - is no folder, and could not be fetched from the Hugging Face hub: {reason} -"
            " check the name and the network, or give a local folder"
        ) from error
    return Path(fetched)


def _json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path.read_bytes(), str(path), CheckpointError)
    except OSError as error:
        raise CheckpointError(f"{path} - cannot be read: {error.strerror}") from error


def _weight_map(index: Path) -> dict[str, str]:
    where = _json(index).get("weight_map")
    if not matches_schema(where, {re.compile(".*"): _SHARD}):
        raise CheckpointError(f"{index} - is damaged: it has no weight_map of names to files")
    return where


def _read_shards(index: Path) -> dict[str, Tensor]:
    where = _weight_map(index)
    read = _read_weights if index.name == _INDEX else _read_pickled
    found: dict[str, Tensor] = {}
    for file in sorted(set(where.values())):
        found |= read(index.parent / file)
    refuse(differences(found, where), f"the files do not hold what {index} says")
    return found


def _read_weights(path: Path) -> dict[str, Tensor]:
    return read_tensors(str(path), str(path))


def _read_pickled(path: Path) -> dict[str, Tensor]:
    found = read_file(path)
    if not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path} - holds no named tensors - convert it to {_WEIGHTS}")
    return found


def read_model(name: str, gradient_checkpointing: bool) -> LmConfig:
    """The settings of the model that `initialize_from_hf` names."""
    model, _ = read_settings(name)
    return replace(model, gradient_checkpointing=gradient_checkpointing)


def read_settings(name: str) -> tuple[LmConfig, int]:
    """The model that a `config.json` describes, and its vocabulary."""
    with _named(name):
        return lm_config(_json(_folder(name, ["config.json"]) / "config.json"))


def read_weights(name: str, config: LmConfig, vocab_size: int) -> dict[str, Tensor]:
    """The weights that `initialize_from_hf` names, after the settings were compared with ours."""
    with _named(name):
        described, weights = read_hf(name)
        theirs, rows = lm_config(described)
        wrong = setting_differences(config, theirs)
        if rows != vocab_size:
            wrong.append(
                f"it has {rows} tokens, this run {vocab_size} (take its data.tokenizer, and set"
                " vocab_size where that has fewer)"
            )
        refuse(wrong, "use_hf_model_config: true takes the model section from it")
        ours, other = (getattr(each, "rope", None) for each in (config, theirs))
        if ours != other:  # how a context is stretched
            _log.warning("model.rope = %s, in %s it is %s", ours, name, other)
        return from_hf(config, weights)


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"initialize_from_hf = {name} - {error}") from error


def write_hf(
    folder: str,
    config: LmConfig,
    tensors: Mapping[str, Tensor],
    tokenizer: str | None,
    eos_id: int | None,
) -> None:
    """Write the folder that transformers loads; it must not exist, or be empty.

    `tokenizer` is a `tokenizer.json`; those that are not of the `tokenizers` library stay out.
    """
    target = Path(local_path(folder)).expanduser().absolute()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{folder} - is there already - give another, or delete it")
    weights = to_hf(config, tensors)
    texts = {"config.json": hf_config(config, len(tensors["token_embedding.weight"]), eos_id)}
    if tokenizer is not None and is_library_tokenizer(tokenizer):
        built = tokenizer_from_text(tokenizer, eos_id, "the tokenizer")
        assert isinstance(built, LibraryTokenizer), "others have no model"
        texts |= tokenizer_files(built, config.seq_len)
        ids = token_ids(built, texts["tokenizer_config.json"])
        texts["config.json"] |= ids
        texts["generation_config.json"] = generation_ids(built, ids)
    work = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    try:
        work.mkdir(parents=True)
        for name, value in texts.items():
            (work / name).write_text(
                json.dumps(value, indent=2, ensure_ascii=False) + "\n", "utf-8"
            )
        with open(work / _WEIGHTS, "wb") as file:
            for piece in tensor_pieces(weights, {"format": "pt"}):  # transformers asks for it
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        flush_folder(str(work))
        work.rename(target)
    except OSError as error:
        raise CheckpointError(f"{folder} - cannot be written: {error.strerror}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def is_library_tokenizer(text: str) -> bool:
    """Whether a saved tokenizer is one that transformers can read."""
    return "model" in json.loads(text)
