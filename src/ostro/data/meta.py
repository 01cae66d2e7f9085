"""`meta.json` and `meta.pkl`: the alphabet that nanoGPT keeps beside the token files.

Either holds `{"vocab_size": n, "itos": ids to characters, "stoi": characters to ids}`.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

from ostro.core.errors import DataError
from ostro.data.sources.files import is_unicode
from ostro.io.pickles import Part, refuse_call, scan

META_FILES = ("meta.json", "meta.pkl")
"""What is looked for in a data set's folder, in this order."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers; naming a class or function could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        refuse_call(f"{module_name}.{global_name}", Part("tuple"))


def _unpickle(data: bytes) -> Any:
    scan(data)
    return _PlainUnpickler(io.BytesIO(data)).load()


def alphabet_of(meta: Any) -> str:
    """The characters in the order of their ids; `ValueError` says what is wrong with `meta`."""
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if not isinstance(itos, dict | list) or not itos:
        raise ValueError("itos must map ids to characters")
    pairs = enumerate(itos) if isinstance(itos, list) else itos.items()
    chars = {int(index): char for index, char in pairs}  # JSON's keys are texts
    for index, char in chars.items():
        if not isinstance(char, str) or len(char) != 1 or not is_unicode(char):
            shown = char if isinstance(char, str) else type(char).__name__
            raise ValueError(f"itos[{index}] = {shown!r:.40} must be one character")
    stoi = {char: index for index, char in sorted(chars.items())}
    if list(stoi.values()) != list(range(len(itos))):
        raise ValueError(f"itos must have each id of 0 to {len(itos) - 1} and each character once")
    if meta.get("stoi", stoi) != stoi:
        raise ValueError("stoi is not the inverse of itos")
    if meta.get("vocab_size", len(stoi)) != len(stoi):
        named = repr(meta["vocab_size"])
        raise ValueError(f"vocab_size = {named:.40}, but itos has {len(stoi)} characters")
    return "".join(stoi)


def read_alphabet(path: Path) -> str:
    """The alphabet of a data set's folder, or of one of its meta files."""
    if path.is_dir():
        found = [path / name for name in META_FILES if (path / name).exists()]
        if not found:
            raise DataError(
                f"tokenizer.path = {path} - has neither meta.json nor meta.pkl - name a data set "
                "of characters, or use the tokenizer gpt2"
            )
        path = found[0]
    try:
        data = path.read_bytes()
        is_pickle = path.suffix == ".pkl"
        return alphabet_of(_unpickle(data) if is_pickle else json.loads(data))
    except Exception as error:  # a damaged pickle raises almost anything
        rule = "cannot be read" if isinstance(error, OSError) else "is no list of characters"
        raise DataError(f"tokenizer.path = {path} - {rule}: {error} - correct the path, or make "
                        "the file again with the data set's prepare.py") from error  # fmt: skip
