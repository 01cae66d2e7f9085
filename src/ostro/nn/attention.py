"""Causal attention on tensors laid out (batch, heads, position, head_size)."""

import torch
import torch.nn.functional as F
from torch import Tensor


class KeyValueCache:
    """Keys and values of tokens seen before, for generation with rows of different lengths.

    Slot p of a row holds the token at position p. A call appends `counts[row]` tokens to each
    row; rows are padded on the right to one length, and what the padding wrote is overwritten
    or masked, because a query at position p sees only the slots up to p.
    """

    def __init__(self, batch_size: int, max_length: int, device: torch.device | None = None):
        self.max_length = max_length
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        self.counts = self.lengths
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, counts: Tensor) -> None:
        """Say how many real tokens of each row the next forward pass brings, (batch,)."""
        self.lengths = self.lengths + self.counts
        self.counts = counts

    def positions(self, num_tokens: int) -> Tensor:
        """Positions of the tokens of this forward pass, (batch, position)."""
        steps = torch.arange(num_tokens, device=self.lengths.device)
        return (self.lengths[:, None] + steps).clamp(max=self.max_length - 1)

    def last(self, hidden: Tensor) -> Tensor:
        """Each row's last real token: (batch, position, embed) -> (batch, 1, embed)."""
        index = (self.counts - 1).clamp(min=0)
        return hidden[torch.arange(len(index), device=index.device), index].unsqueeze(1)

    def update(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store (batch, heads, position, head_size); return all keys, values, and the mask."""
        if layer not in self._layers:
            batch, heads, _, size = key.shape
            self._layers[layer] = tuple(
                x.new_zeros(batch, heads, self.max_length, size) for x in (key, value)
            )
        keys, values = self._layers[layer]
        positions = self.positions(key.shape[2])  # (batch, position)
        index = positions[:, None, :, None].expand(key.shape)
        keys.scatter_(2, index, key)
        values.scatter_(2, index, value)
        slots = torch.arange(self.max_length, device=key.device)
        mask = slots <= positions[:, None, :, None]  # (batch, 1, position, slot)
        return keys, values, mask


def segment_mask(segments: Tensor) -> Tensor:
    """(batch, position) -> bool (batch, 1, position, position): causal, inside equal segments."""
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same.tril()


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
    causal mask. `upcast` computes in float32. Returns the layout and dtype of the query.
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
        is_causal=mask is None,
        scale=scale,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return result.to(dtype)
