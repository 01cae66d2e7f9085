"""Causal attention on tensors laid out (batch, heads, position, head_size)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostro import kernels
from ostro.nn.collectives import Group, gather_sequence


class KeyValueCache:
    """Keys and values of tokens seen before, for generation with rows of different lengths.

    Slot p of a row holds the token at position p. Before each forward pass `append` says how many
    real tokens each row brings; rows are padded on the right to one length, and what the padding
    wrote is masked and later overwritten, because a query at position p sees only slots up to p.
    """

    def __init__(self, batch_size: int, max_length: int):
        self.max_length = max_length
        self._lengths = [0] * batch_size  # tokens before this forward pass
        self._counts = [0] * batch_size  # tokens that it brings
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._mask: Tensor | None = None

    def append(self, counts: Sequence[int]) -> None:
        """Say how many real tokens of each row the next forward pass brings."""
        self._lengths = [sum(pair) for pair in zip(self._lengths, self._counts, strict=True)]
        self._counts = list(counts)
        self._mask = None

    def positions(self, num_tokens: int, device: torch.device) -> Tensor:
        """Positions of the tokens of this forward pass, (batch, position)."""
        steps = torch.arange(num_tokens, device=device)
        starts = torch.tensor(self._lengths, device=device)
        return (starts[:, None] + steps).clamp(max=self.max_length - 1)

    def last(self, hidden: Tensor) -> Tensor:
        """Each row's last real token: (batch, position, embed) -> (batch, 1, embed)."""
        index = torch.tensor(self._counts, device=hidden.device).sub(1).clamp(min=0)
        return hidden[torch.arange(len(index), device=hidden.device), index].unsqueeze(1)

    def update(
        self, layer: int, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store new keys and values, (batch, heads, position, head_size).

        Returns the keys and values to attend to, and the mask (None: causal).
        """
        batch, heads, num_tokens, size = key.shape
        if layer not in self.layers:
            shape = (batch, heads, self.max_length, size)
            self.layers[layer] = (key.new_zeros(shape), value.new_zeros(shape))
        keys, values = self.layers[layer]
        first, used = self._lengths[0], max(self._lengths) + num_tokens
        if used <= self.max_length and self._lengths.count(first) == batch:
            keys[:, :, first:used], values[:, :, first:used] = key, value
            if first == 0 or num_tokens == 1:
                return keys[:, :, :used], values[:, :, :used], None
        positions = self.positions(num_tokens, key.device)[:, None, :, None]
        index = positions.expand(key.shape)
        keys.scatter_(2, index, key)
        values.scatter_(2, index, value)
        used = min(used, self.max_length)
        if self._mask is None:  # the same for every layer
            slots = torch.arange(used, device=key.device)
            self._mask = slots <= positions  # (batch, 1, position, slot)
        return keys[:, :, :used], values[:, :, :used], self._mask


def segment_mask(segments: Tensor) -> Tensor:
    """(batch, position) -> bool (batch, 1, position, position): causal, inside equal segments."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()


class CausalAttention(nn.Module):
    """`causal_attention` with its settings, a cache, and the sequence in parts on several devices.

    `context` is the group of devices among which sequences are cut as `sequence_part` says.
    """

    context: Group | None = None

    def __init__(self, layer: int, *, scale: float, dropout: float = 0.0, upcast: bool = False):
        super().__init__()
        self.layer, self.scale, self.dropout, self.upcast = layer, scale, dropout, upcast

    def fused(
        self, qkv: Tensor, mask: Tensor | None = None, cache: KeyValueCache | None = None
    ) -> Tensor:
        """Attention of (batch, position, kv_heads, group + 2, head_size), see `forward`.

        For each key-value head: the queries of its group, its key, its value.
        """
        dropout = self.dropout if self.training else 0.0
        plain = mask is None and cache is None and self.context is None
        if plain and not dropout and not self.upcast:
            found = kernels.attention(qkv, self.scale)
            if found is not None:
                return found
        group = qkv.shape[3] - 2
        parts = (
            [x.flatten(2, 3) for x in qkv.split([group, 1, 1], 3)] if group > 1 else qkv.unbind(3)
        )
        return self(*(x.transpose(1, 2) for x in parts), mask, cache)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """(batch, heads, position, head_size) -> (batch, position, heads * head_size)."""
        settings = {
            "scale": self.scale,
            "dropout": self.dropout if self.training else 0.0,
            "upcast": self.upcast,
        }
        if cache is not None:
            key, value, mask = cache.update(self.layer, key, value)
        elif self.context is not None:
            attended = self._attend_parts(query, key, value, mask, self.context, settings)
            return attended.transpose(1, 2).flatten(2)
        attended = causal_attention(query, key, value, mask=mask, **settings)
        return attended.transpose(1, 2).flatten(2)

    def _attend_parts(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, context: Group,
        settings: dict,
    ) -> Tensor:  # fmt: skip
        """Each of this device's two pieces of the queries sees all keys up to its own end."""
        key, value = gather_sequence(key, context), gather_sequence(value, context)
        size = query.shape[2] // 2
        found = []
        for half, piece in enumerate((context.rank, 2 * context.size - 1 - context.rank)):
            end = (piece + 1) * size
            rows = slice(half * size, (half + 1) * size)
            asked, keys, values = query[:, :, rows], key[:, :, :end], value[:, :, :end]
            if mask is not None:
                seen = mask[:, :, rows, :end]
            elif query.is_cpu and not settings["dropout"]:
                found.append(_attend_up_to_end(asked, keys, values, self.scale, self.upcast))
                continue
            else:
                from torch.nn.attention.bias import causal_lower_right  # makes folders at import

                seen = causal_lower_right(size, end)  # CUDA's kernels know it; others make a mask
            found.append(causal_attention(asked, keys, values, mask=seen, **settings))
        return torch.cat(found, 2)


def _attend_up_to_end(
    query: Tensor, key: Tensor, value: Tensor, scale: float, upcast: bool
) -> Tensor:
    """Causal attention of the last queries of a sequence, without a mask, on a CPU."""
    dtype, group = query.dtype, query.shape[1] // key.shape[1]
    if upcast:
        query, key, value = query.float(), key.float(), value.float()
    if group > 1:
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    return _LastQueries.apply(query, key, value, scale).to(dtype)


class _LastQueries(torch.autograd.Function):
    """Attention to the keys before the queries' own, and causally to these, put together.

    The two results are weighted with their shares of the softmax's sum. Its logarithm, of both
    together, is all that the backward pass of either part needs to know about the other
    (arXiv:2205.14135).
    """

    @staticmethod
    def forward(ctx, query, key, value, scale):
        before = key.shape[2] - query.shape[2]
        result, log_sum = _flash(query, key[:, :, before:], value[:, :, before:], True, scale)
        if before:
            other, more = _flash(query, key[:, :, :before], value[:, :, :before], False, scale)
            both = torch.logaddexp(log_sum, more)
            first, second = (log_sum - both).exp(), (more - both).exp()
            mixed = result * first.unsqueeze(-1) + other * second.unsqueeze(-1)
            result, log_sum = mixed.to(query.dtype), both
        ctx.save_for_backward(query, key, value, result, log_sum)
        ctx.before, ctx.scale = before, scale
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        query, key, value, result, log_sum = ctx.saved_tensors
        grad_query, grad_key, grad_value = None, torch.empty_like(key), torch.empty_like(value)
        for part in (slice(0, ctx.before), slice(ctx.before, None)):
            if part.stop == 0:
                continue
            found, grad_key[:, :, part], grad_value[:, :, part] = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                    grad, query, key[:, :, part], value[:, :, part], result, log_sum, 0.0,
                    part.stop is None, scale=ctx.scale,
                )
            )  # fmt: skip
            grad_query = found if grad_query is None else grad_query + found
        return grad_query, grad_key, grad_value, None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention, and the logarithm of the softmax's sum: (batch, heads, position)."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, 0.0, is_causal, scale=scale
    )


def causal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    upcast: bool = False,
) -> Tensor:
    """`softmax(scale * q k^T) v` over earlier positions.

    query is (batch, heads, position, head_size); key and value may have fewer heads, each then
    serves a group of consecutive query heads. `mask` (bool, True = may attend) replaces the
    causal mask; without one a single query sees every key. `upcast`
    computes in float32. Returns the layout and dtype of the query.
    """
    dtype = query.dtype
    if upcast:
        query, key, value = query.float(), key.float(), value.float()
    result = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=dropout,
        is_causal=mask is None and query.shape[2] > 1,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return result.to(dtype)
