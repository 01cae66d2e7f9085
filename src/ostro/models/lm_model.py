"""What every language model offers: a registry of configurations and one forward signature."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ostro import kernels
from ostro.config import Choice
from ostro.core.axes import EMBED, MLP
from ostro.core.errors import Problem, did_you_mean
from ostro.nn import (
    ACTIVATIONS,
    KeyValueCache,
    Linear,
    TiedGradient,
    initialize,
    linear_cross_entropy,
    token_losses,
)
from ostro.nn.attention import segment_mask
from ostro.nn.collectives import Group, enter, gather, local, sequence_part
from ostro.nn.linear import apply_all

__all__ = ["LmConfig", "LmModel", "initialize"]


class LmConfig(Choice):
    """The architecture of a language model; `type` picks the family."""

    default_type = "gpt2"
    reference_checkpoint: ClassVar[str | None] = None
    """The model of the Hugging Face hub that `initialize_from_hf: true` means."""

    seq_len: int

    @abstractmethod
    def build(self, vocab_size: int, compute_dtype: torch.dtype = torch.float32) -> "LmModel":
        """The model with float32 parameters, not initialised, on the current default device."""

    @abstractmethod
    def flops_per_token(self, vocab_size: int) -> int:
        """Operations of the forward pass per token, with attention counted over all `seq_len`.

        A training step costs three times this.
        """


class LmModel(nn.Module, ABC):
    """A causal language model: tokens to logits or to a loss.

    Subclasses make `config`, `blocks` and `final_norm`, and give `embed`, `head_weight` and what
    their blocks need to know of positions. The vocabulary can be split over the devices of
    `vocab_group`, and sequences over those of `context`.
    """

    config: Any
    blocks: nn.ModuleList
    final_norm: nn.Module
    vocab_group: Group | None = None
    context: Group | None = None

    def hidden(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KeyValueCache | None = None,
        tie: TiedGradient | None = None,
    ) -> Tensor:
        """Tokens (batch, position) -> normalised states (batch, position, embed).

        `mask` replaces the causal one, (batch or 1, 1, query, position). `positions` (position,)
        are those of the tokens where these are only some of the sequence. `tie` is as of `embed`.
        """
        if cache is not None:
            positions = cache.positions(tokens.shape[1], tokens.device)
        elif positions is None:
            positions = torch.arange(tokens.shape[1], device=tokens.device)
        x, inputs = self.embed(tokens, positions, tie).float(), self.block_inputs(positions)
        recompute = self.config.gradient_checkpointing and cache is None
        for block in self.blocks:
            x = run_block(block, recompute, x, *inputs, mask, cache)
        return self.final_norm(x)[1]

    @abstractmethod
    def embed(self, tokens: Tensor, positions: Tensor, tie: TiedGradient | None = None) -> Tensor:
        """What the first block is given, in the dtype of the tables.

        A model whose head is tied passes `tie` on to the lookup of its tokens.
        """

    def block_inputs(self, positions: Tensor) -> tuple[Tensor, ...]:
        """What the attention of every block is given of `positions`, (position,) or (batch,
        position): nothing, or the cosines and sines of rotary angles."""
        return ()

    @abstractmethod
    def head_weight(self) -> Tensor:
        """The weight of the head, (vocab, embed)."""

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        segments: Tensor | None = None,
        scale: float | Tensor = 1.0,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Logits, or with `targets` the loss in nats as float32.

        tokens and targets are int64 (batch, position); a target of -100 means nothing to predict.
        Without targets: logits (batch, position, vocab); with a `cache` only those of each row's
        last real token, (batch, 1, vocab). With targets: the sum over predicted positions times
        `scale`; over this device's positions, where sequences are split. Attention stays inside
        equal `segments` (batch, position).
        """
        if targets is not None:
            return self._loss(tokens, targets, segments, scale)
        mask = None if segments is None else segment_mask(segments)
        hidden = self.hidden(tokens, mask=mask, cache=cache)
        if cache is not None:
            hidden = cache.last(hidden)
        weight, group = self.head_weight(), self.vocab_group
        logits = F.linear(hidden, local(weight).to(hidden.dtype))
        return logits if group is None else gather(logits, group, len(weight))

    def token_losses(self, tokens: Tensor, targets: Tensor, segments: Tensor | None) -> Tensor:
        """The loss of each target in nats, float32 (batch, position), 0 where there is none.

        For whole models without gradients; arguments as of `forward`.
        """
        hidden = self.hidden(tokens, mask=None if segments is None else segment_mask(segments))
        return token_losses(hidden.flatten(0, 1), self.head_weight(), targets.flatten()).view_as(
            targets
        )

    def _loss(
        self, tokens: Tensor, targets: Tensor, segments: Tensor | None, scale: float | Tensor
    ) -> Tensor:
        tie, positions = TiedGradient(), None
        mask = None if segments is None else segment_mask(segments)
        if self.context is not None:
            positions = sequence_part(tokens.shape[1], self.context, tokens.device)
            tokens, targets = tokens[:, positions], targets[:, positions]
            mask = None if mask is None else mask[:, :, positions]
        hidden = self.hidden(tokens, mask=mask, positions=positions, tie=tie)
        group = self.vocab_group
        return linear_cross_entropy(
            enter(hidden, group), self.head_weight(), targets, scale=scale, tie=tie, group=group
        )


class Block(nn.Module):
    """Attention and MLP, each on a normalised copy and added back."""

    def __init__(
        self, norms: Sequence[nn.Module], attention: nn.Module, mlp: nn.Module, dropout: float = 0.0
    ):
        super().__init__()
        self.norm_1, self.attention = norms[0], attention
        self.norm_2, self.mlp = norms[1], mlp
        self.dropout = dropout

    def forward(self, x: Tensor, *rest) -> Tensor:
        """(batch, position, embed) -> the same; `rest` goes to the attention."""
        x, normed = self.norm_1(x)
        attended = F.dropout(self.attention(normed, *rest), self.dropout, self.training)
        x, normed = self.norm_2(x, attended)
        return x + F.dropout(self.mlp(normed), self.dropout, self.training)


class Mlp(nn.Module):
    """`down(activation(up(x)))`, or with a gate `down(activation(gate(x)) * up(x))`."""

    def __init__(self, config: Any, width: int, *, gated: bool):
        super().__init__()
        embed, mlp = (EMBED, config.hidden_dim), (MLP, width)
        std, bias = config.initializer_range, config.use_bias
        self.activation = ACTIVATIONS[config.activation_function]
        self.gate = Linear(embed, mlp, bias, deviation=std) if gated else None
        self.up = Linear(embed, mlp, bias, deviation=std)
        self.down = Linear(mlp, embed, bias, deviation=std / (2 * config.num_layers) ** 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, position, embed) -> the same."""
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        gate, up = apply_all(x, self.gate, self.up)
        gated = kernels.silu_gate(gate, up) if self.activation is F.silu else None
        return self.down(self.activation(gate) * up if gated is None else gated)


def run_block(block: nn.Module, recompute: bool, *args) -> Tensor:
    """Run a block; with `recompute` its activations are computed again in the backward pass."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *args, use_reentrant=False)
    return block(*args)


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Inside, no gradients and no dropout; the model's mode is restored behind it."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():  # inference mode would taint tensors that training reuses
            yield
    finally:
        model.train(was_training)


def size_problems(config: LmConfig, names: Sequence[str]) -> Iterator[Problem]:
    """A problem for each field that should be a positive number and is not."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            yield Problem(name, "must be positive")


def activation_problems(name: str) -> Iterator[Problem]:
    """A problem when `activation_function` is not one of ours."""
    if name not in ACTIVATIONS:
        known = "must be one of " + ", ".join(ACTIVATIONS)
        yield Problem("activation_function", known, did_you_mean(name, ACTIVATIONS))
