"""Special tokens in a `tokenizer.json`: what its template adds, and texts that spell one.

A tokenizer of `<s> $A </s>` puts `<s>` before a text and `</s>` behind it. A document takes both; a
prompt takes the beginning only, since the model is to continue it.

A web page about tokenizers may spell `</s>`. It is a text like any other, so documents are encoded
with a copy of the tokenizer in which special tokens have names that no text has (`unspellable`).
The library's own switch for this (`encode_special_tokens`) only ignores the list of added tokens: a
Unigram or WordLevel model that has `</s>` among its pieces would still give it.
"""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any

import tokenizers

_MARKED = re.compile(r"<.+>|\[.+\]")
"""What the name of a special token looks like."""
_UNSPELLABLE = "\ufdd0\ufdd1{}\ufdd1\ufdd0"  # of characters that Unicode says no text has
_MAX_SHOWN = 12


def special_tokens(spec: Mapping[str, Any], eos: str | None) -> dict[str, int]:
    """Name and id of every token that stands for no text."""
    added = {token["content"]: token["id"] for token in spec["added_tokens"]}
    found = {t["content"]: t["id"] for t in spec["added_tokens"] if t["special"]}
    if eos is not None and eos in added:
        found[eos] = added[eos]
    elif eos is not None and _MARKED.fullmatch(eos):
        found[eos] = vocabulary(spec)[eos]
    return found


def vocabulary(spec: Mapping[str, Any]) -> dict[str, int]:
    """The ids of the model's own tokens, by name."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, Mapping):
        return dict(vocab)
    return {piece: index for index, (piece, _) in enumerate(vocab)}


def candidates(spec: Mapping[str, Any]) -> str:
    """The tokens that may be meant to end a document, for a message."""
    names = [token["content"] for token in spec["added_tokens"]]
    names = names or [name for name in vocabulary(spec) if _MARKED.fullmatch(name)]
    if not names:
        return "the tokenizer has no special tokens"
    more = f" and {len(names) - _MAX_SHOWN} more" if len(names) > _MAX_SHOWN else ""
    return f"the tokenizer has {', '.join(names[:_MAX_SHOWN])}{more}"


def spelling(names: Iterable[str]) -> re.Pattern[str] | None:
    """Finds the names in a text, the longest first; None where there are no names."""
    parts = sorted(filter(None, names), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, parts))) if parts else None


def beginning(spec: Mapping[str, Any]) -> list[int]:
    """The ids that the post-processor puts before a text."""
    if spec["post_processor"] is None:
        return []
    text = 1 << 30  # an id that no template has
    probe = {
        "version": "1.0",
        "added_tokens": [],
        "post_processor": spec["post_processor"],
        "model": {"type": "WordLevel", "vocab": {"x": text}, "unk_token": "x"},
    }
    whole = {"truncation": None, "padding": None, "normalizer": None, "pre_tokenizer": None}
    inner = tokenizers.Tokenizer.from_str(json.dumps({**probe, **whole, "decoder": None}))
    ids = inner.encode("x").ids
    return ids[: ids.index(text)]


def unspellable(spec: Mapping[str, Any], names: Iterable[str]) -> tokenizers.Tokenizer:
    """The same tokenizer, but for texts that spell one of `names`: these stay text."""
    new = {name: _UNSPELLABLE.format(name) for name in names}
    model = {**spec["model"], "unk_token": _renamed(spec["model"].get("unk_token"), new)}
    if isinstance(vocab := model["vocab"], Mapping):
        model["vocab"] = {new.get(name, name): index for name, index in vocab.items()}
    else:
        model["vocab"] = [[new.get(piece, piece), score] for piece, score in vocab]
    if "unk_token" not in spec["model"]:
        del model["unk_token"]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        pairs = [m.split(" ", 1) if isinstance(m, str) else m for m in model["merges"]]
        model["merges"] = [
            [left, right]
            for left, right in pairs
            if new.keys().isdisjoint((left, right, left + right.removeprefix(prefix)))
        ]
    added = [
        {**token, "content": new.get(token["content"], token["content"])}
        for token in spec["added_tokens"]
    ]
    return tokenizers.Tokenizer.from_str(
        json.dumps({**spec, "model": model, "added_tokens": added})
    )


def _renamed(name: str | None, new: Mapping[str, str]) -> str | None:
    return None if name is None else new.get(name, name)
