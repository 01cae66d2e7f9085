"""Checksums of a finished cache: one for every block of its files, in `checksums.bin`.

At every start some blocks are read and compared, all of them where the cache is small;
`ostro cache --verify` compares all. Caches of earlier versions have none and are taken as they are.
"""

import os
import random
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ostro.core.errors import DataError
from ostro.data.cache.identity import write_whole
from ostro.io.json_schema import FILE_NAME, matches_schema

FILE = "checksums.bin"
_BLOCK = 1 << 18
_SAMPLE = 32  # blocks of a file that are compared at a start
_SHAPE = {"file": FILE_NAME, "block": int, "crc": int, "files": [(FILE_NAME, int)]}


def write(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Write the checksums of files; returns what the ledger says of them."""
    sums: list[int] = []
    sizes = []
    for name in names:
        with open(folder / name, "rb") as file:
            while block := file.read(_BLOCK):
                sums.append(zlib.crc32(block))
            sizes.append([name, file.tell()])
    data = np.array(sums, dtype="<u4").tobytes()
    write_whole(folder / FILE, data)
    return {"file": FILE, "block": _BLOCK, "crc": zlib.crc32(data), "files": sizes}


def verify(folder: Path, ledger: dict[str, Any], *, whole: bool = False) -> bool:
    """Compare the files of a cache with their checksums, all of them or a sample of the blocks.

    False where there are no checksums. Raises `DataError` for a damaged file.
    """
    described = ledger.get("checksums")
    if described is None:
        return False
    if not matches_schema(described, _SHAPE) or described["block"] <= 0:
        raise _damaged(folder, folder / "ledger.json", "its entry for the checksums is no such")
    try:
        data = (folder / described["file"]).read_bytes()
    except OSError as error:
        raise _damaged(folder, folder / described["file"], error.strerror or str(error)) from error
    if zlib.crc32(data) != described["crc"] or len(data) % 4:
        raise _damaged(folder, folder / described["file"], "it is not what was written")
    sums = np.frombuffer(data, dtype="<u4")
    block, first = described["block"], 0
    for name, size in described["files"]:
        count = -(-size // block)
        _verify_file(folder, name, block, sums[first : first + count], whole)
        first += count
    return True


def _verify_file(folder: Path, name: str, block: int, sums: np.ndarray, whole: bool) -> None:
    count = len(sums)
    chosen: Sequence[int] = range(count)
    if not whole and count > 2 * _SAMPLE:
        # Others at every start, so that in time all are compared.
        inner = random.Random(os.urandom(8)).sample(range(1, count - 1), _SAMPLE - 2)
        chosen = sorted([0, *inner, count - 1])
    try:
        with open(folder / name, "rb", buffering=0) as file:
            for number in chosen:
                found = os.pread(file.fileno(), block, number * block)
                if zlib.crc32(found) != sums[number]:
                    start = number * block
                    what = f"bytes {start} to {start + len(found)} are not what was written there"
                    raise _damaged(folder, folder / name, what)
    except OSError as error:
        raise _damaged(folder, folder / name, error.strerror or str(error)) from error


def _damaged(folder: Path, path: Path, what: str) -> DataError:
    return DataError(
        f"{path} - {what}: the cache is damaged - delete {folder}, and it is built again at the"
        " next start"
    )
