"""GPT-2 (Radford et al. 2019): learned positions, LayerNorm first, GELU, tied head."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostro.core.axes import EMBED, HEADS, POSITION, VOCAB
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
    LayerNorm,
    Linear,
    TiedGradient,
)


@LmConfig.register_subclass("gpt2")
@dataclass(frozen=True)
class Gpt2Config(LmConfig):
    """GPT-2 in any size; the defaults are GPT-2 small (124M parameters)."""

    reference_checkpoint: ClassVar[str | None] = "openai-community/gpt2"

    seq_len: int = 1024
    """Tokens per sequence, also the number of learned positions."""
    hidden_dim: int = 768
    """Width of the residual stream; a multiple of `num_heads`."""
    num_layers: int = 12
    """Number of transformer blocks."""
    num_heads: int = 12
    """Attention heads per block."""
    mlp_scale: int = 4
    """Width of the MLP as a multiple of `hidden_dim`."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; projections back into the residual stream get
    this divided by sqrt(2 `num_layers`)."""
    embed_pdrop: float = 0.0
    """Dropout probability on the sum of token and position embeddings."""
    resid_pdrop: float = 0.0
    """Dropout probability on what each attention and MLP adds to the residual stream."""
    attn_pdrop: float = 0.0
    """Dropout probability on attention weights."""
    layer_norm_epsilon: float = 1e-5
    """Added to the variance in LayerNorm."""
    activation_function: str = "gelu_new"
    """relu, silu, swish, gelu, gelu_new (tanh approximation), quick_gelu or tanh; also the other
    names that transformers has for these: gelu_python, gelu_pytorch_tanh, gelu_fast ..."""
    scale_attn_by_inverse_layer_idx: bool = False
    """Also divide attention logits by the layer's index + 1."""
    upcast_attn: bool = False
    """Compute attention in float32."""
    gradient_checkpointing: bool = True
    """Keep only each block's input and compute the rest again in the backward pass: less memory,
    about a third more work."""
    use_bias: bool = True
    """Biases in linear layers and in LayerNorm."""

    def build(self, vocab_size: int, compute_dtype: torch.dtype = torch.float32) -> "Gpt2Model":
        """See `LmConfig.build`."""
        return Gpt2Model(self, vocab_size, compute_dtype)

    def flops_per_token(self, vocab_size: int) -> int:
        """See `LmConfig.flops_per_token`."""
        embed = self.hidden_dim
        mlp = 2 * 2 * embed * self.mlp_scale * embed
        projections = 2 * embed * 3 * embed + 2 * embed * embed
        attention = 4 * self.seq_len * embed + 3 * self.seq_len * self.num_heads
        return self.num_layers * (mlp + projections + attention) + 2 * embed * vocab_size

    def problems(self) -> Iterator[Problem]:
        """Shapes and names that cannot work."""
        sizes = ("seq_len", "hidden_dim", "num_layers", "num_heads", "mlp_scale")
        yield from size_problems(self, (*sizes, "initializer_range", "layer_norm_epsilon"))
        if self.num_heads > 0 and self.hidden_dim % self.num_heads:
            yield Problem(
                "num_heads",
                f"must divide hidden_dim = {self.hidden_dim}",
                "change one of the two",
            )
        yield from activation_problems(self.activation_function)
        for name in ("embed_pdrop", "resid_pdrop", "attn_pdrop"):
            if not 0 <= getattr(self, name) < 1:
                yield Problem(name, "must be at least 0 and below 1")


class Gpt2Model(LmModel):
    """The model; parameters are float32, computation runs in `compute_dtype`."""

    def __init__(self, config: Gpt2Config, vocab_size: int, compute_dtype: torch.dtype):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        embed, std = (EMBED, config.hidden_dim), config.initializer_range
        self.token_embedding = Embedding((VOCAB, vocab_size), embed, deviation=std)
        self.position_embedding = Embedding((POSITION, config.seq_len), embed, deviation=std)

        def norm() -> LayerNorm:
            eps, bias = config.layer_norm_epsilon, config.use_bias
            return LayerNorm(embed, eps=eps, bias=bias, dtype=compute_dtype)

        def block(layer: int) -> Block:
            mlp = Mlp(config, config.mlp_scale * config.hidden_dim, gated=False)
            attention = Gpt2Attention(config, layer)
            return Block((norm(), norm()), attention, mlp, config.resid_pdrop)

        self.blocks = nn.ModuleList(block(layer) for layer in range(config.num_layers))
        self.final_norm = norm()

    def embed(self, tokens: Tensor, positions: Tensor, tie: TiedGradient | None = None) -> Tensor:
        """See `LmModel.embed`."""
        assert positions.shape[-1] <= self.config.seq_len, "more tokens than learned positions"
        x = self.token_embedding(tokens, tie) + self.position_embedding(positions)
        return F.dropout(x, self.config.embed_pdrop, self.training)

    def head_weight(self) -> Tensor:
        """The token embedding: the head is tied to it."""
        return self.token_embedding.weight


class Gpt2Attention(nn.Module):
    """Causal self-attention. The rows of `qkv` are (heads, 3, head_size): heads stay together."""

    def __init__(self, config: Gpt2Config, layer: int):
        super().__init__()
        embed, width, std = (EMBED, config.hidden_dim), config.hidden_dim, config.initializer_range
        self.head_size = config.hidden_dim // config.num_heads
        scale = self.head_size**-0.5
        if config.scale_attn_by_inverse_layer_idx:
            scale /= layer + 1
        self.attend = CausalAttention(
            layer, scale=scale, dropout=config.attn_pdrop, upcast=config.upcast_attn
        )
        back = std / (2 * config.num_layers) ** 0.5
        bias, heads = config.use_bias, config.num_heads
        rows = (HEADS, 3 * width)
        self.qkv = Linear(embed, rows, bias, deviation=std, num_heads=heads, fused=(1, 1, 1))
        self.out = Linear((HEADS, width), embed, bias, deviation=back, num_heads=heads)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KeyValueCache | None) -> Tensor:
        """(batch, position, embed) -> the same."""
        batch, position, _ = x.shape
        qkv = self.qkv(x).view(batch, position, -1, 3, self.head_size)
        return self.out(self.attend.fused(qkv, mask, cache))
