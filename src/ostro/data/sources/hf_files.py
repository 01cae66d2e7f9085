"""The files that Hugging Face keeps beside a `tokenizer.json`: names of tokens, chat template, ids.

What they say is kept with the tokenizer as `described`, so that an export has it again:

    {"tokenizer_config": {...},  # with special_tokens_map.json and chat_template.jinja
     "token_ids": {...}}         # bos, eos and pad of config.json and generation_config.json
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

CHAT_TEMPLATE = "chat_template.jinja"
FILES = (
    "tokenizer_config.json",
    "special_tokens_map.json",
    "config.json",
    "generation_config.json",
    CHAT_TEMPLATE,
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_described(folder: Path) -> dict[str, Any]:
    """What the files of a folder say; those that are missing say nothing."""
    config, names, model, generation = (_object(folder / name) for name in FILES[:4])
    config |= {key: value for key, value in names.items() if config.get(key) is None}
    if (path := folder / CHAT_TEMPLATE).exists():
        config["chat_template"] = path.read_text(encoding="utf-8")
    known = {**model, **{key: value for key, value in generation.items() if value is not None}}
    ids = {key: known[key] for key in TOKEN_IDS if known.get(key) is not None}
    found = {"tokenizer_config": config, "token_ids": ids}
    return {key: value for key, value in found.items() if value}


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} holds no object")
    return value


def token_name(described: Mapping[str, Any], key: str) -> str | None:
    """The text of `eos_token`, `bos_token` ..., which may be an object with flags."""
    value = described.get("tokenizer_config", {}).get(key)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def end_of_document(described: Mapping[str, Any], inner: tokenizers.Tokenizer) -> str | None:
    """The token that ends a document: the tokenizer's own, else the first of the model's."""
    if name := token_name(described, "eos_token"):
        return name
    ids = described.get("token_ids", {}).get("eos_token_id")
    for index in ids if isinstance(ids, list) else [ids]:
        if isinstance(index, int) and 0 <= index < 1 << 32 and inner.id_to_token(index):
            return inner.id_to_token(index)
    return None
