"""Copies weights between transformers' models and ours, for parity tests."""

import torch


def randomize(model, seed=0, deviation=0.2):
    """Fill every parameter, biases and norms too; gains are centred on one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, deviation, generator=generator)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1.0)


def _heads_major(parts, num_kv_heads):
    """Stack q, k, v rows so that each key-value head's rows lie together."""
    split = [part.unflatten(0, (num_kv_heads, -1)) for part in parts]
    return torch.cat(split, 1).flatten(0, 1)


def gpt2_values(theirs, num_heads, read):
    """Our parameter names -> values taken from transformers' GPT-2 by `read(parameter)`."""
    body = theirs.transformer
    found = {
        "token_embedding.weight": read(body.wte.weight),
        "position_embedding.weight": read(body.wpe.weight),
        "final_norm.weight": read(body.ln_f.weight),
        "final_norm.bias": read(body.ln_f.bias),
    }
    for i, block in enumerate(body.h):
        at = f"blocks.{i}"
        for ours, norm in (("norm_1", block.ln_1), ("norm_2", block.ln_2)):
            found[f"{at}.{ours}.weight"] = read(norm.weight)
            found[f"{at}.{ours}.bias"] = read(norm.bias)
        linears = {
            "attention.qkv": block.attn.c_attn,
            "attention.out": block.attn.c_proj,
            "mlp.up": block.mlp.c_fc,
            "mlp.down": block.mlp.c_proj,
        }
        for ours, linear in linears.items():
            weight, bias = read(linear.weight).T, read(linear.bias)
            if ours == "attention.qkv":
                weight = _heads_major(weight.chunk(3), num_heads)
                bias = _heads_major(bias.chunk(3), num_heads)
            found[f"{at}.{ours}.weight"], found[f"{at}.{ours}.bias"] = weight, bias
    return found


def llama_values(theirs, num_kv_heads, read):
    """Our parameter names -> values taken from transformers' Llama by `read(parameter)`."""
    body = theirs.model
    found = {
        "token_embedding.weight": read(body.embed_tokens.weight),
        "final_norm.weight": read(body.norm.weight),
    }
    if not theirs.config.tie_word_embeddings:
        found["head.weight"] = read(theirs.lm_head.weight)
    for i, block in enumerate(body.layers):
        at, attention = f"blocks.{i}", block.self_attn
        found[f"{at}.norm_1.weight"] = read(block.input_layernorm.weight)
        found[f"{at}.norm_2.weight"] = read(block.post_attention_layernorm.weight)
        linears = {
            "attention.qkv": (attention.q_proj, attention.k_proj, attention.v_proj),
            "attention.out": (attention.o_proj,),
            "mlp.gate": (block.mlp.gate_proj,),
            "mlp.up": (block.mlp.up_proj,),
            "mlp.down": (block.mlp.down_proj,),
        }
        for ours, parts in linears.items():
            for kind in ("weight", "bias"):
                values = [getattr(part, kind) for part in parts]
                if values[0] is None:
                    continue
                values = [read(value) for value in values]
                joined = values[0] if len(values) == 1 else _heads_major(values, num_kv_heads)
                found[f"{at}.{ours}.{kind}"] = joined
    return found


def load(ours, values):
    """Copy values into our model; every parameter must be there."""
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == values.keys()
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def assert_close(ours, theirs, tolerance, what):
    """The largest absolute difference is at most the tolerance."""
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance, f"{what}: {difference:.2e}"
