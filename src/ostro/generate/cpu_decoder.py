"""Steps of one token on CPUs: weights in the dtype of the computation, one native call."""

import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ostro import kernels
from ostro.kernels.decoder import ACTIVATIONS, Decoder
from ostro.models.lm_model import Block, LmModel, Mlp
from ostro.nn import Embedding, KeyValueCache, LayerNorm, Linear, RMSNorm

MAX_ROWS = 8
"""With more rows at once, products of matrices are faster."""


@contextmanager
def in_compute_dtype(model: LmModel) -> Iterator[None]:
    """Inside, weights of linear layers and tables are cast once, not in every forward pass.

    Nothing changes where the parameters are split over devices, or have that dtype already.
    """
    dtype: torch.dtype = getattr(model, "compute_dtype", torch.float32)
    casting = (each for each in model.modules() if isinstance(each, Embedding | Linear))
    parameters = [p for each in casting for p in each.parameters() if p.dtype != dtype]
    if any(hasattr(p, "to_local") for p in parameters):
        parameters = []
    kept = [p.data for p in parameters]
    memory = _large_pages(sum(p.numel() + 63 for p in parameters), dtype, kept)
    try:
        start = 0
        for p in parameters:
            cast = memory[start : start + p.numel()].view(p.shape)
            start += -(-p.numel() // 64) * 64
            p.data = cast.copy_(p.data)
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


def _large_pages(count: int, dtype: torch.dtype, like: list[Tensor]) -> Tensor:
    """New memory; on a CPU in large pages where the kernel has them, which are read faster."""
    if not like or not like[0].is_cpu or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(count, dtype=dtype, device=like[0].device if like else None)
    memory = mmap.mmap(-1, count * dtype.itemsize)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype)


def decoder_of(model: LmModel, cache: KeyValueCache, rows: int) -> Decoder | None:
    """The native step of a model, whose cache the prompts have filled; None where there is none."""
    blocks = getattr(model, "blocks", ())
    used = [p for p in model.parameters() if p.ndim > 1]
    dtype = getattr(model, "compute_dtype", None)
    plain = all(p.is_cpu and p.dtype == dtype and p.is_contiguous() for p in used)
    plain = plain and not any(hasattr(p, "to_local") for p in used)
    known = bool(blocks) and all(_is_known(block, type(model.final_norm)) for block in blocks)
    if not (plain and known and dtype in (torch.float32, torch.bfloat16) and rows <= MAX_ROWS):
        return None
    if model._compiled_call_impl is not None or kernels.active_kind() != "native":
        return None
    first, config, head = blocks[0], model.config, model.head_weight()
    keys, _ = cache.layers[0]
    kv_heads, capacity, head_size = keys.shape[1:]
    group = first.attention.out.weight.shape[1] // (kv_heads * head_size)
    shared: dict[str, Any] = {
        "is_bf16": dtype == torch.bfloat16,
        "embed": head.shape[1],
        "kv_heads": kv_heads,
        "group": group,
        "head_size": head_size,
        "mlp": len(first.mlp.up.weight),
        "vocab": len(head),
        "capacity": capacity,
        "rms": isinstance(model.final_norm, RMSNorm),
        "activation": ACTIVATIONS[config.activation_function],
        "eps": model.final_norm.eps,
        "head": head,
        **_weights(final_norm=model.final_norm),
    }
    rope = getattr(config, "rope", None)
    if rope is not None:
        shared["cos"], shared["sin"] = rope.tables(torch.arange(capacity), head_size)
    layers = [
        _weights(norm_1=block.norm_1, norm_2=block.norm_2, qkv=block.attention.qkv,
                 out=block.attention.out, gate=block.mlp.gate, up=block.mlp.up,
                 down=block.mlp.down)
        | {"keys": cache.layers[index][0], "values": cache.layers[index][1],
           "scale": block.attention.attend.scale}
        for index, block in enumerate(blocks)
    ]  # fmt: skip
    return Decoder(shared, layers)


def _is_known(block: nn.Module, norm: type) -> bool:
    """Whether `decode.cpp` does what the block does."""
    if type(block) is not Block or type(block.mlp) is not Mlp:
        return False
    layers = {type(block.attention.qkv), type(block.attention.out), type(block.mlp.up)}
    norms = {norm, type(block.norm_1), type(block.norm_2)}
    return layers == {Linear} and norms in ({LayerNorm}, {RMSNorm})


def _weights(**modules: nn.Module | None) -> dict[str, Tensor | None]:
    found = {}
    for name, module in modules.items():
        found[name] = getattr(module, "weight", None)
        found[f"{name}_bias"] = getattr(module, "bias", None)
    return found
