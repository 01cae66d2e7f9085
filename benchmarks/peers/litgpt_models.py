"""litgpt's GPT: SDPA, no cache, its own loss in one piece; rotary positions in either family."""

from typing import Any

from torch import Tensor, nn
from torch.nn import functional


def build(sizes: dict[str, Any]) -> nn.Module:
    """A model of these sizes, head tied to the embedding, with litgpt's first weights."""
    from litgpt import GPT, Config

    gpt2 = {"norm_class_name": "LayerNorm", "mlp_class_name": "GptNeoxMLP", "bias": True}
    gpt2 |= {"gelu_approximate": "tanh", "attn_bias": True}
    llama = {"norm_class_name": "RMSNorm", "mlp_class_name": "LLaMAMLP", "bias": False}
    llama |= {"rotary_percentage": 1.0}
    model = GPT(
        Config(
            block_size=sizes["seq_len"],
            padded_vocab_size=sizes["vocab_size"],
            n_layer=sizes["num_layers"],
            n_head=sizes["num_heads"],
            n_embd=sizes["hidden_dim"],
            intermediate_size=sizes["mlp_dim"],
            parallel_residual=False,
            **(gpt2 if sizes["family"] == "gpt2" else llama),
        )
    )
    model.apply(model._init_weights)
    model.lm_head.weight = model.transformer.wte.weight
    return model


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss over the predicted positions."""
    from litgpt.utils import chunked_cross_entropy

    targets = functional.pad(tokens[:, 1:], (0, 1), value=-100)
    return chunked_cross_entropy(model(tokens), targets, chunk_size=0)
