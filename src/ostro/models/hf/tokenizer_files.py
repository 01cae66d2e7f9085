"""A tokenizer as transformers reads it, with the tokens and ids that its own files name."""

import json
from typing import Any

from ostro.data.sources.hf_files import token_name
from ostro.data.tokenizer import LibraryTokenizer

# What the exported tokenizer.json decides, and what holds elsewhere only.
_DROPPED = {"auto_map", "add_bos_token", "add_eos_token", "name_or_path", "tokenizer_file"}


def tokenizer_files(tokenizer: LibraryTokenizer, seq_len: int) -> dict[str, Any]:
    """`tokenizer.json` and `tokenizer_config.json`."""
    given = tokenizer.described.get("tokenizer_config") or {}
    config = {key: _added(value) for key, value in given.items() if key not in _DROPPED}
    end = _name(tokenizer, tokenizer.eos_id)
    if token_name(tokenizer.described, "eos_token") != end:
        config["eos_token"] = end
    if not given:  # then the template tells; without one, documents begin behind an end
        config["bos_token"] = _name(tokenizer, next(iter(tokenizer.begin), None)) or end
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": seq_len}
    return {
        "tokenizer.json": json.loads(tokenizer.inner.to_str()),
        "tokenizer_config.json": config,
    }


def token_ids(tokenizer: LibraryTokenizer, config: dict[str, Any]) -> dict[str, Any]:
    """`bos_token_id`, `eos_token_id` and `pad_token_id`; `config` is `tokenizer_config.json`."""
    given = tokenizer.described.get("token_ids") or {}
    found = {"eos_token_id": tokenizer.eos_id}
    for key in ("bos", "pad"):
        name = token_name({"tokenizer_config": config}, f"{key}_token")
        known = given.get(f"{key}_token_id")
        found[f"{key}_token_id"] = known if name is None else tokenizer.inner.token_to_id(name)
    return found


def generation_ids(tokenizer: LibraryTokenizer, ids: dict[str, Any]) -> dict[str, Any]:
    """The ids for `generation_config.json`, where a model may end at several tokens."""
    ends = (tokenizer.described.get("token_ids") or {}).get("eos_token_id")
    several = isinstance(ends, list) and tokenizer.eos_id in ends
    found = {**ids, "eos_token_id": ends} if several else ids
    return {key: value for key, value in found.items() if value is not None}


def _name(tokenizer: LibraryTokenizer, index: int | None) -> str | None:
    return None if index is None else tokenizer.inner.id_to_token(index)


def _added(value: Any) -> Any:
    """Tokens with flags as tokenizer_config.json has them; special_tokens_map.json leaves out
    of what class they are."""
    if isinstance(value, list):
        return [_added(item) for item in value]
    if isinstance(value, dict) and "content" in value:
        return {"__type": "AddedToken", **value}
    return value
