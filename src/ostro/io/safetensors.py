"""One file of named tensors in the safetensors format, written as a stream.

The library writes a file only by name and all at once. Writing its 20-line format here gives
the exact size before anything is written, a checksum without reading back, no second copy of
the tensors in memory, and object stores as targets. Reading is the library's.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from ostro.core.errors import CheckpointError

_CHUNK = 1 << 24
_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def _ordered(tensors: Mapping[str, Tensor]) -> list[str]:
    # Wide types first, so that every tensor starts at a multiple of its element size.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def header_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The length word and the header: name, type, shape and offsets of every tensor."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name in _ordered(tensors):
        tensor = tensors[name]
        assert tensor.dtype in _NAMES, f"{name}: {tensor.dtype} cannot be kept in a checkpoint"
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def file_size(tensors: Mapping[str, Tensor]) -> int:
    """Exact size in bytes of the file; the tensors may be on the meta device."""
    data = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    return len(header_bytes(tensors)) + data


def tensor_pieces(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The file, piece by piece. Waits for the device that holds the tensors."""
    yield header_bytes(tensors, metadata)
    for name in _ordered(tensors):
        tensor = tensors[name].detach()
        if isinstance(tensor, DTensor):  # of one rank: more of them save together
            tensor = tensor.full_tensor()
        flat = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        data = memoryview(flat.numpy())
        for start in range(0, len(data), _CHUNK):
            yield data[start : start + _CHUNK]


def read_tensors(path: str, name: str) -> dict[str, Tensor]:
    """The tensors of a local file, on the CPU. `name` is what an error calls the file.

    They are mapped into memory privately: writing to one does not change the file.
    """
    try:
        return load_file(path)
    except Exception as error:  # native code, which documents no error types
        raise CheckpointError(f"{name} - is not a readable safetensors file: {error}") from error
