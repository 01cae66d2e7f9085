"""Files that `torch.save` writes: read after a look through their zip archive.

torch takes what the pickle in it says at its word: a storage larger than its record, a view
larger than its storage, an array of so many zeros. Here all of it has to add up, so that what is
read takes memory and time in proportion to the file.
"""

import pickle
import zipfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from ostro.core.errors import CheckpointError
from ostro.io.pickles import Part, check_key, items, scan

_PICKLE = "data.pkl"
_REPEATS = 8  # tensors may share a storage: a head that is tied, moments of the same weights
_SLACK = 1 << 20
_WITH_DTYPE = "torch._utils._rebuild_tensor_v3"
_REBUILD = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2", _WITH_DTYPE}
_ITEM_SIZES = {
    "BFloat16Storage": 2, "BoolStorage": 1, "ByteStorage": 1, "CharStorage": 1,
    "ComplexDoubleStorage": 16, "ComplexFloatStorage": 8, "DoubleStorage": 8, "FloatStorage": 4,
    "HalfStorage": 2, "IntStorage": 4, "LongStorage": 8, "ShortStorage": 2,
}  # fmt: skip
_PARAMETER = "torch._utils._rebuild_parameter"


def read_file(path: Path, *, check: bool = True) -> dict[str, Any]:
    """The mapping in a file, on the CPU; anything but tensors and plain values is refused.

    `check` false is for a look at what is no tensor: these stay on the disk, uncompared.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # torch reads past damage without a word
            check_archive(archive, path.stat().st_size)
            if check and (damaged := archive.testzip()) is not None:
                raise CheckpointError(f"{path} - is damaged: {damaged} differs from its checksum")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=not check)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} - is no checkpoint of tensors and plain values, and pickled objects are not"
            " loaded: they can run code - save it again with tensors, numbers and text only"
        ) from error
    except FileNotFoundError:
        raise CheckpointError(f"{path} - not found") from None
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle raises almost anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path} - is damaged or no checkpoint: {reason}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} - is no checkpoint: it holds a {type(content).__name__}")
    return content


def check_archive(archive: zipfile.ZipFile, num_bytes: int) -> None:
    """Look through an archive of so many bytes; a `ValueError` or `UnpicklingError` says why it
    must not be read. Checksums are not compared."""
    records, name = _records(archive, num_bytes)
    content = _Content(records, num_bytes)
    scan(archive.read(name), content.call, content.load)


def _records(archive: zipfile.ZipFile, num_bytes: int) -> tuple[Mapping[str, int], str]:
    """Sizes of the records by name, without the folder that all are in; the pickle's full name."""
    infos = archive.infolist()
    folder = infos[0].filename.partition("/")[0] if infos else ""
    sizes: dict[str, int] = {}
    for info in infos:
        top, _, name = info.filename.partition("/")
        if not folder or top != folder or not name or ".." in name.split("/"):
            raise ValueError(f"{info.filename!r:.80} does not lie in its folder {folder!r:.80}")
        if name in sizes:
            raise ValueError(f"it holds {name!r:.80} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError(f"{name!r:.80} is compressed, which torch.save never does")
        sizes[name] = info.file_size
    if sum(sizes.values()) > num_bytes:
        raise ValueError("what it holds is larger than the file")
    if _PICKLE not in sizes:
        raise ValueError(f"it holds no {_PICKLE}")
    return sizes, f"{folder}/{_PICKLE}"


class _Content:
    """What a pickle of `torch.save` may ask for, held against the records of its archive."""

    def __init__(self, records: Mapping[str, int], num_bytes: int):
        self._records = records
        self._limit = num_bytes * _REPEATS + _SLACK
        self._total = 0

    def load(self, name: Part) -> Part:
        """A storage: `("storage", its type, the name of its record, a device, its length)`."""
        values = [part.value for part in items(name)]
        if len(values) != 5 or values[0] != "storage" or items(name)[1].kind != "global":
            raise ValueError("the pickle is damaged: the name of a storage is none")
        _, kind, key, _, length = values
        size = _count(length) * _item_size(kind)
        if not isinstance(key, str) or self._records.get(f"data/{key}", -1) < size:
            raise ValueError(f"storage {key!r:.40} is larger than its record")
        return Part("storage", (size, _item_size(kind)))

    def call(self, name: str, arguments: Part) -> Part:
        """What a function that torch.save names would return."""
        given = items(arguments)
        if name in _REBUILD and len(given) >= 4:
            return self._tensor(*given[:4], dtype=given[6] if name == _WITH_DTYPE else None)
        if name == _PARAMETER and given and given[0].kind == "tensor":
            return Part("tensor")
        if name == "collections.OrderedDict" and not given:
            return Part("dict", "attributes")
        if name in ("builtins.set", "__builtin__.set") and [p.kind for p in given] == ["list"]:
            for key in items(given[0]):
                check_key(key)
            return Part("set")
        plain = [part.value for part in given if part.kind == "plain"]
        if name == "_codecs.encode" and len(given) == 2 and plain[1:] == ["latin1"]:
            return Part("plain", b"")
        if name in ("torch.device", "torch.Size"):
            return Part("made")
        raise pickle.UnpicklingError(f"it asks for {name}")

    def _tensor(
        self, storage: Part, offset: Part, size: Part, stride: Part, dtype: Part | None
    ) -> Part:
        if storage.kind != "storage":
            raise ValueError("the pickle is damaged: a tensor has no storage")
        num_bytes, item_size = storage.value
        if dtype is not None:
            item_size = _dtype(dtype.value).itemsize
        sizes, strides = ([_count(n.value) for n in items(part)] for part in (size, stride))
        if len(sizes) != len(strides):
            raise ValueError("the pickle is damaged: a tensor has other strides than dimensions")
        number = prod(sizes)
        last = sum((n - 1) * step for n, step in zip(sizes, strides, strict=True))
        end = max(number, _count(offset.value) + last + 1) * item_size
        if number and end > num_bytes:
            raise ValueError(f"a tensor of {sizes} is larger than its storage of {num_bytes} bytes")
        self._total += number * item_size
        if self._total > self._limit:
            raise ValueError("its tensors share so much that they are far larger than the file")
        return Part("tensor")


def _count(value: object) -> int:
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ValueError(f"the pickle is damaged: {value!r:.40} is no size")
    return value


def _item_size(name: str) -> int:
    """Bytes of an element of a storage type such as torch.FloatStorage."""
    module, _, kind = name.rpartition(".")
    if name == "torch.storage.UntypedStorage":
        return 1
    if module not in ("torch", "torch.cuda") or kind not in _ITEM_SIZES:
        raise pickle.UnpicklingError(f"it asks for {name}")
    return _ITEM_SIZES[kind]


def _dtype(name: object) -> torch.dtype:
    found = getattr(torch, str(name).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ValueError("the pickle is damaged: a tensor has no dtype")
    return found
