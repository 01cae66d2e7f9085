"""`meta.json` and `meta.pkl`: the alphabet that nanoGPT keeps beside the token files.

Either holds `{"vocab_size": n, "itos": ids to characters, "stoi": characters to ids}`.
"""

import io
import json
import pickle
from pathlib import Path
from typing import Any

from ostro.data.files import is_unicode
from ostro.errors import DataError

META_FILES = ("meta.json", "meta.pkl")
"""What is looked for in a data set's folder, in this order."""


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, texts and numbers; naming a class or function could run code."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        raise pickle.UnpicklingError(
            f"it asks for {module_name}.{global_name}, and only plain dicts, lists, texts and "
            "whole numbers are read from a pickle"
        )


def alphabet_of(meta: dict[str, Any]) -> str:
    """The characters in the order of their ids; `ValueError` says what is wrong with `meta`."""
    itos = meta.get("itos") if isinstance(meta, dict) else None
    if isinstance(itos, list):
        itos = dict(enumerate(itos))
    if not isinstance(itos, dict) or not itos:
        raise ValueError("itos must map ids to characters")
    by_id = {int(key): char for key, char in itos.items()}  # JSON's keys are texts
    if sorted(by_id) != list(range(len(itos))):
        raise ValueError(f"the ids of itos must be 0 to {len(itos) - 1}")
    for index, char in by_id.items():
        if not isinstance(char, str) or len(char) != 1 or not is_unicode(char):
            raise ValueError(f"itos[{index}] = {char!r} must be one character")
    alphabet = "".join(by_id[index] for index in range(len(by_id)))
    stoi = {char: index for index, char in enumerate(alphabet)}
    if len(stoi) != len(alphabet):
        raise ValueError("itos has a character twice")
    if meta.get("stoi", stoi) != stoi:
        raise ValueError("stoi is not the inverse of itos")
    if meta.get("vocab_size", len(stoi)) != len(stoi):
        raise ValueError(f"vocab_size = {meta['vocab_size']}, but itos has {len(stoi)} characters")
    return alphabet


def read_alphabet(path: Path) -> str:
    """The alphabet of a data set's folder, or of one of its meta files."""
    if path.is_dir():
        found = [path / name for name in META_FILES if (path / name).exists()]
        if not found:
            raise DataError(
                f"tokenizer.path = {path} - the folder has neither meta.json nor meta.pkl - name "
                "the folder that a prepare.py of characters filled, or use the tokenizer gpt2"
            )
        path = found[0]
    try:
        data = path.read_bytes()
        pickled = path.suffix == ".pkl"
        return alphabet_of(
            _PlainUnpickler(io.BytesIO(data)).load() if pickled else json.loads(data)
        )
    except OSError as error:
        raise DataError(
            f"tokenizer.path = {path} - cannot be read: {error.strerror} - correct the path"
        ) from error
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(
            f"tokenizer.path = {path} - is no list of characters: {error} - make it again with "
            "the data set's prepare.py"
        ) from error
