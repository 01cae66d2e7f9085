"""Llama (Touvron et al. 2023): rotary positions, RMSNorm, gated MLP, grouped heads."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn

from ostro.core.axes import EMBED, HEADS, VOCAB
from ostro.core.errors import Problem
from ostro.models.lm_model import (
    Block,
    LmConfig,
    LmModel,
    Mlp,
    activation_problems,
    size_problems,
)
from ostro.nn import (
    CausalAttention,
    Embedding,
    KeyValueCache,
    Linear,
    RMSNorm,
    RotaryConfig,
    TiedGradient,
    turn_fused,
)
from ostro.nn.rotary import DefaultRotaryConfig


@LmConfig.register_subclass("llama")
@dataclass(frozen=True)
class LlamaConfig(LmConfig):
    """Llama in any size; the defaults are Llama 2 7B."""

    reference_checkpoint: ClassVar[str | None] = "NousResearch/Llama-2-7b-hf"

    seq_len: int = 2048
    """Tokens per sequence."""
    hidden_dim: int = 4096
    """Width of the residual stream."""
    intermediate_dim: int = 11008
    """Width of the gated MLP."""
    num_layers: int = 32
    """Number of transformer blocks."""
    num_heads: int = 32
    """Query heads per block."""
    num_kv_heads: int = 32
    """Key and value heads per block; divides `num_heads`, each serves an equal group of them."""
    head_dim: int | None = None
    """Width of a head. Null: `hidden_dim` / `num_heads`."""
    activation_function: str = "silu"
    """relu, silu, swish, gelu, gelu_new (tanh approximation), quick_gelu or tanh; also the other
    names that transformers has for these: gelu_python, gelu_pytorch_tanh, gelu_fast ..."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream get
    this divided by sqrt(2 `num_layers`)."""
    layer_norm_epsilon: float = 1e-5
    """Added to the mean square in RMSNorm."""
    tie_word_embeddings: bool = False
    """Use the token embedding as the head."""
    upcast_attn: bool = False
    """Compute attention in float32."""
    gradient_checkpointing: bool = True
    """Keep only each block's input and compute the rest again in the backward pass: less memory,
    about a third more work."""
    use_bias: bool = False
    """Biases in the linear layers of the blocks."""
    rope: RotaryConfig = field(default_factory=DefaultRotaryConfig)
    """Rotary position embedding and its scaling."""

    def build(self, vocab_size: int, compute_dtype: torch.dtype = torch.float32) -> "LlamaModel":
        """See `LmConfig.build`."""
        return LlamaModel(self, vocab_size, compute_dtype)

    @property
    def head_size(self) -> int:
        """Width of a head, resolved."""
        return self.head_dim or self.hidden_dim // self.num_heads

    def flops_per_token(self, vocab_size: int) -> int:
        """See `LmConfig.flops_per_token`."""
        embed, heads = self.hidden_dim, self.num_heads * self.head_size
        mlp = 2 * 3 * embed * self.intermediate_dim
        qkv = 2 * embed * (self.num_heads + 2 * self.num_kv_heads) * self.head_size
        attention = 4 * self.seq_len * heads + 3 * self.seq_len * self.num_heads
        per_layer = mlp + qkv + 2 * heads * embed + attention
        return self.num_layers * per_layer + 2 * embed * vocab_size

    def problems(self) -> Iterator[Problem]:
        """Shapes and names that cannot work."""
        sizes = ("seq_len", "hidden_dim", "intermediate_dim", "num_layers", "num_heads")
        more = ("num_kv_heads", "head_dim", "initializer_range", "layer_norm_epsilon")
        wrong_sizes = list(size_problems(self, sizes + more))
        yield from wrong_sizes
        yield from activation_problems(self.activation_function)
        if wrong_sizes:
            return
        if self.head_dim is None and self.hidden_dim % self.num_heads:
            rule = f"must divide hidden_dim = {self.hidden_dim}"
            yield Problem("num_heads", rule, "change one of the two, or set head_dim")
        elif self.head_size % 2:
            rule = f"makes heads of odd size {self.head_size}, but rotary embeddings turn pairs"
            name = "num_heads" if self.head_dim is None else "head_dim"
            yield Problem(name, rule, "choose an even head size")
        if self.num_heads % self.num_kv_heads:
            rule = f"must divide num_heads = {self.num_heads}"
            yield Problem("num_kv_heads", rule, "change one of the two")


class LlamaModel(LmModel):
    """The model; parameters are float32, computation runs in `compute_dtype`."""

    def __init__(self, config: LlamaConfig, vocab_size: int, compute_dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        embed, vocab, std = (
            (EMBED, config.hidden_dim),
            (VOCAB, vocab_size),
            config.initializer_range,
        )
        self.token_embedding = Embedding(vocab, embed, deviation=std)

        def norm() -> RMSNorm:
            return RMSNorm(embed, eps=config.layer_norm_epsilon, bias=False, dtype=compute_dtype)

        def block(layer: int) -> Block:
            mlp = Mlp(config, config.intermediate_dim, gated=True)
            return Block((norm(), norm()), LlamaAttention(config, layer), mlp)

        self.blocks = nn.ModuleList(block(layer) for layer in range(config.num_layers))
        self.final_norm = norm()
        tied = config.tie_word_embeddings
        self.head = None if tied else Linear(embed, vocab, bias=False, deviation=std)

    def embed(self, tokens: Tensor, positions: Tensor, tie: TiedGradient | None = None) -> Tensor:
        """See `LmModel.embed`."""
        return self.token_embedding(tokens, tie if self.config.tie_word_embeddings else None)

    def block_inputs(self, positions: Tensor) -> tuple[Tensor, ...]:
        """See `LmModel.block_inputs`: each (batch or 1, position, 1, 1, head_size / 2)."""
        positions = positions.expand(1, -1) if positions.ndim == 1 else positions
        tables = self.config.rope.tables(positions, self.config.head_size)
        return tuple(table[:, :, None, None] for table in tables)  # one angle for all heads

    def head_weight(self) -> Tensor:
        """The head's own weight, or the token embedding when tied."""
        return self.token_embedding.weight if self.head is None else self.head.weight


class LlamaAttention(nn.Module):
    """Causal self-attention with grouped heads.

    The rows of `qkv` are (kv_heads, group + 2, head_size): for each key-value head the queries of
    its group, then its key, then its value, so that it splits by key-value heads.
    """

    def __init__(self, config: LlamaConfig, layer: int):
        super().__init__()
        heads, size = config.num_kv_heads, config.head_size
        self.group, self.head_size = config.num_heads // heads, size
        self.attend = CausalAttention(layer, scale=size**-0.5, upcast=config.upcast_attn)
        embed, std = (EMBED, config.hidden_dim), config.initializer_range
        back = std / (2 * config.num_layers) ** 0.5
        bias, rows = config.use_bias, (HEADS, heads * (self.group + 2) * size)
        fused = (self.group, 1, 1)
        self.qkv = Linear(embed, rows, bias, deviation=std, num_heads=heads, fused=fused)
        width = (HEADS, config.num_heads * size)
        self.out = Linear(width, embed, bias, deviation=back, num_heads=heads)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, cache: KeyValueCache | None
    ) -> Tensor:
        """(batch, position, embed) -> the same."""
        batch, position, _ = x.shape
        qkv = self.qkv(x).view(batch, position, -1, self.group + 2, self.head_size)
        return self.out(self.attend.fused(turn_fused(qkv, cos, sin), mask, cache))
