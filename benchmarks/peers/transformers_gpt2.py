"""transformers' GPT-2 with our weights: SDPA, no dropout, no cache, loss by its own labels."""

import torch
from torch import Tensor, nn


def build(config, vocab_size: int, weights: dict[str, Tensor]) -> nn.Module:
    """transformers' model of the sizes of our `Gpt2Config`, filled with our parameters."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocab_size,
            n_positions=config.seq_len,
            n_embd=config.hidden_dim,
            n_layer=config.num_layers,
            n_head=config.num_heads,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
            bos_token_id=0,
            eos_token_id=0,
        )
    )
    model.load_state_dict(_renamed(weights, config.num_heads), strict=False)
    return model


def _renamed(weights: dict[str, Tensor], num_heads: int) -> dict[str, Tensor]:
    names = {
        "token_embedding": "transformer.wte",
        "position_embedding": "transformer.wpe",
        "final_norm": "transformer.ln_f",
        "blocks": "transformer.h",
        "norm_1": "ln_1",
        "norm_2": "ln_2",
        "attention.qkv": "attn.c_attn",
        "attention.out": "attn.c_proj",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    found = {}
    for name, value in weights.items():
        if ".qkv." in name:  # (heads, 3, head_size) rows -> (3, heads, head_size)
            value = value.unflatten(0, (num_heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        if name.startswith("blocks.") and value.ndim == 2:
            value = value.T  # stored (in, out) there
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        found[name] = value
    return found


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss over the predicted positions, under bfloat16 autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return model(input_ids=tokens, labels=tokens).loss
