"""A copy of a state in the CPU's memory, made by another thread while gradients are computed."""

import threading

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ostro.checkpoint.sharded import Tensors
from ostro.runtime.phase import enter_phase


class Stager:
    """Copies tensors into buffers that are kept between copies.

    The training thread calls `begin` and then, before it changes one of the tensors, `wait`;
    another thread calls `copy` in between. From a GPU a stream of its own copies to pinned memory.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._copied = threading.Event()
        self._preparation: threading.Thread | None = None
        self._stream: torch.cuda.Stream | None = None

    def prepare(self, tensors: Tensors) -> None:
        """Make the buffers in a thread: the first use of memory takes longer than a copy."""
        own = {(group, name): t for group, named in tensors.items() for name, t in named.items()}

        def touch() -> None:
            for key, tensor in own.items():
                self._buffer(key, _local(tensor)).zero_()

        self._preparation = threading.Thread(target=touch, name="buffers", daemon=True)
        self._preparation.start()

    def settle(self) -> None:
        """Return once the buffers are made."""
        if self._preparation is not None:
            self._preparation.join()
            self._preparation = None

    def begin(self) -> None:
        """What is to be copied are the tensors as they are now."""
        self._copied.clear()
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            self._stream = self._stream or torch.cuda.Stream()
            self._stream.wait_stream(torch.cuda.current_stream())

    def copy(self, tensors: Tensors) -> Tensors:
        """The copies, by group and name; those before are overwritten."""
        try:
            self.settle()
            enter_phase("stage")
            with torch.no_grad(), torch.cuda.stream(self._stream):
                copies = {
                    group: {name: self._copy((group, name), t) for name, t in named.items()}
                    for group, named in tensors.items()
                }
        finally:
            self._copied.set()
        if self._stream is not None:
            self._stream.synchronize()
        return copies

    def wait(self) -> None:
        """Return once the copies are made; on a GPU, once what is queued next comes after them."""
        self._copied.wait()
        if self._stream is not None:
            torch.cuda.current_stream().wait_stream(self._stream)

    def _copy(self, key: tuple[str, str], tensor: Tensor) -> Tensor:
        own = _local(tensor)
        buffer = self._buffer(key, own).copy_(own, non_blocking=True)
        if isinstance(tensor, DTensor):  # as it is, but in this memory; from_local would move it
            return DTensor(buffer, tensor._spec, requires_grad=False)
        return buffer

    def _buffer(self, key: tuple[str, str], own: Tensor) -> Tensor:
        buffer = self._buffers.get(key)
        if buffer is None or (buffer.shape, buffer.dtype) != (own.shape, own.dtype):
            buffer = torch.empty(own.shape, dtype=own.dtype, pin_memory=own.is_cuda)
            self._buffers[key] = buffer
        return buffer


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
