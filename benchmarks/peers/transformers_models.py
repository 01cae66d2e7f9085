"""transformers' GPT-2 and Llama: SDPA, no dropout, no cache, the loss by their own labels."""

from typing import Any

from torch import Tensor, nn


def build(sizes: dict[str, Any]) -> nn.Module:
    """A model of these sizes, head tied to the embedding, with transformers' first weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    common = {"vocab_size": sizes["vocab_size"], "use_cache": False, "attn_implementation": "sdpa"}
    common |= {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": True}
    if sizes["family"] == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                n_positions=sizes["seq_len"],
                n_embd=sizes["hidden_dim"],
                n_layer=sizes["num_layers"],
                n_head=sizes["num_heads"],
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **common,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            max_position_embeddings=sizes["seq_len"],
            hidden_size=sizes["hidden_dim"],
            intermediate_size=sizes["mlp_dim"],
            num_hidden_layers=sizes["num_layers"],
            num_attention_heads=sizes["num_heads"],
            rms_norm_eps=1e-5,
            **common,
        )
    )


def loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """Mean loss over the predicted positions."""
    return model(input_ids=tokens, labels=tokens).loss
