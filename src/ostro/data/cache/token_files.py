"""Files of raw token ids, checked once: that they are what they are said to be, and every id.

Such a file has no header, so nothing in it says how wide its ids are, or that it is none: what it
begins with and how its values are spread has to tell.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ostro.core.errors import DataError
from ostro.data.cache.documents import TokenFiles
from ostro.data.cache.fingerprints import known_files, read_files
from ostro.data.cache.store import TokenStore, locked, read_json, write_json
from ostro.data.sources.files import Shard

logger = logging.getLogger("ostro.data")

_RECORD = "tokens.json"
_SHAPE = {"key": dict, "largest": (int, int)}
_HEADERS = {
    b"\x93NUMPY": "a NumPy array with a header",
    b"PK\x03\x04": "a zip archive (.npz, .pt)",
    b"\x1f\x8b\x08": "compressed with gzip",
    b"\x28\xb5\x2f\xfd": "compressed with zstd",
    b"\xfd7zXZ\x00": "compressed with xz",
    b"PAR1": "a parquet file",
    b"ARROW1": "an Arrow file",
    b"\x89HDF\r\n": "an HDF5 file",
    np.array(20240520, "<i4").tobytes(): "a token file of llm.c, with a header of 1,024 bytes",
    np.array(20240801, "<i4").tobytes(): "a token file of llm.c, with a header of 1,024 bytes",
}
_SAMPLE, _NUM_SAMPLES, _FEW = 1 << 14, 16, 32
_OPEN_WIDE = {2: "uint32", 4: "int64"}


def open_token_files(
    name: str,
    shards: Sequence[Shard],
    dtype: str,
    num_ids: int,
    eos_id: int | None,
    folder: Path,
    *,
    verify: bool = False,
) -> tuple[TokenStore, TokenFiles, dict]:
    """Map token files; returns what they are known by, too.

    What one reading found is kept in `folder`, made by the first of the processes that start.
    `verify`: read them again. Raises `DataError` for files that hold something else, or an id of
    `num_ids` or more.
    """
    size = np.dtype(dtype).itemsize
    for shard in shards:
        _require_ids(shard, dtype, size)
    names = [shard.files[0].path for shard in shards]
    advice = "set the tokenizer that made the file, or dtype"
    store = TokenStore.open(names, dtype, num_ids, advice)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            known = _known(name, shards, dtype, store, folder, verify)
    except OSError as error:
        raise DataError(
            f"{folder} - cannot be written: {error.strerror} - set cache_dir"
        ) from error
    largest, position = known["largest"]
    if largest >= num_ids:
        raise store.out_of_range(largest, position)
    sizes = [(name, shard.size // size) for name, shard in zip(names, shards, strict=True)]
    return store, TokenFiles(store, sizes, eos_id), known["key"]


def _known(
    name: str, shards: Sequence[Shard], dtype: str, store: TokenStore, folder: Path, verify: bool
) -> dict:
    path = folder / _RECORD
    known = read_json(path, _SHAPE)
    if known is not None and (verify or not _holds(known["key"], shards, dtype, folder)):
        known = None
    if known is None:
        logger.info("%s: checking %d token files (once)", name, len(shards))
        files = [row[1:] for row in read_files(folder, shards)]
        known = {"key": {"files": files, "dtype": dtype}, "largest": store.largest()}
        write_json(path, known)
    return known


def _holds(key: dict, shards: Sequence[Shard], dtype: str, folder: Path) -> bool:
    """Whether what is known was found in these files."""
    files = key.get("files")
    try:
        recorded = [["", int(size), str(print_)] for size, print_ in files or ()]
    except (TypeError, ValueError):  # not as it was written
        return False
    now = [row[1:] for row in known_files(folder, shards, recorded)]
    return key == {"files": now, "dtype": dtype}


def _require_ids(shard: Shard, dtype: str, size: int) -> None:
    """`DataError` where a file is no row of ids of this type."""
    if not shard.files:
        raise DataError(f"{shard.name} - token files must be on this machine - copy it here")
    path = shard.files[0].path
    try:
        with open(path, "rb") as file:
            head = file.read(1 << 12)
    except OSError as error:
        raise DataError(f"{path} - cannot be read: {error.strerror}") from error
    for magic, what in _HEADERS.items():
        if head.startswith(magic):
            advice = "write the ids alone, without a header"
            if magic.startswith(b"\x93"):
                advice += f": numpy.load({path!r}).astype({dtype!r}).tofile('tokens.bin')"
            raise DataError(f"{path} - is {what}, not a row of {dtype} ids - {advice}")
    if shard.size == 0 or shard.size % size:
        rule = f"{shard.size} bytes, no multiple of {size}" if shard.size else "is empty"
        raise DataError(f"{path} - {rule} - it holds no {dtype} ids; make it again or set dtype")
    if _is_text(head):
        raise DataError(
            f"{path} - holds text, not {dtype} ids - give it as train_urls, or make token ids of it"
        )
    wider = _OPEN_WIDE.get(size)
    if wider and _is_wider(path, shard.size, size):
        raise DataError(
            f"{path} - its ids look wider than {dtype}: every second {dtype} is 0 or nearly so -"
            f" set dtype: {wider}"
        )


def _is_text(head: bytes) -> bool:
    if len(head) < 2 * _FEW:
        return False
    try:
        text = head.decode()
    except UnicodeDecodeError as error:
        if error.reason != "unexpected end of data":  # a character may be cut in two
            return False
        text = head[: error.start].decode()
    return all(char.isprintable() or char in "\n\r\t\f" for char in text)


def _is_wider(path: str, num_bytes: int, size: int) -> bool:
    """Whether the upper halves of ids are read as ids of their own: small all the time, while those
    between are not. In a row of ids both would be spread alike."""
    kind = np.dtype(f"<u{size}")
    count = num_bytes // size
    parts = []
    for index in range(_NUM_SAMPLES):
        start = index * max(count - _SAMPLE, 0) // (_NUM_SAMPLES - 1) // 2 * 2
        with open(path, "rb") as file:
            file.seek(start * size)
            parts.append(np.fromfile(file, kind, min(_SAMPLE, count) // 2 * 2))
        if count <= _SAMPLE:
            break
    sample = np.concatenate(parts)
    lower, upper = sample[0::2], sample[1::2]
    if len(upper) < _FEW // 2 or len(np.unique(lower[:4096])) < 3:
        return False
    high = int(upper.max())
    return high == 0 or (high < 16 and len(upper) >= 256 and int(lower.max()) > 64 * (high + 1))
