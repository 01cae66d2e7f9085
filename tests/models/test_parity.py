"""Same weights, same logits and gradients as transformers, in float32."""

import pytest
import torch
import torch.nn.functional as F
from transformers_weights import assert_close, load, randomize, values

from ostro.models import Gpt2Config, LlamaConfig
from ostro.nn.rotary import (
    DefaultRotaryConfig,
    LinearRotaryConfig,
    Llama3RotaryConfig,
    YarnRotaryConfig,
)

VOCAB = 97


def check(config, theirs):
    ours = config.build(VOCAB)
    randomize(theirs)
    load(ours, values(theirs, config, lambda parameter: parameter.detach()))
    generator = torch.Generator().manual_seed(1)
    tokens, targets = torch.randint(VOCAB, (2, 2, config.seq_len), generator=generator)
    logits = theirs(tokens).logits
    assert logits.abs().max() > 3  # far from a flat softmax
    assert_close(ours(tokens), logits, 1e-5, "logits")
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    our_loss = ours(tokens, targets) / targets.numel()
    our_loss.backward()
    assert_close(our_loss, loss, 1e-5, "loss")
    gradients = values(theirs, config, lambda parameter: parameter.grad)
    for name, parameter in ours.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-4, f"gradient of {name}")


@pytest.mark.parametrize("inverse_scaling", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("activation", "epsilon"), [("gelu_new", 1e-5), ("gelu", 1e-3), ("quick_gelu", 1e-5)]
)
def test_gpt2_equals_transformers(inverse_scaling, checkpointing, activation, epsilon):
    from transformers import GPT2Config, GPT2LMHeadModel

    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_embd=48,
            n_layer=3,
            n_head=4,
            activation_function=activation,
            scale_attn_by_inverse_layer_idx=inverse_scaling,
            layer_norm_epsilon=epsilon,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    config = Gpt2Config(
        seq_len=64,
        hidden_dim=48,
        num_layers=3,
        num_heads=4,
        activation_function=activation,
        scale_attn_by_inverse_layer_idx=inverse_scaling,
        layer_norm_epsilon=epsilon,
        gradient_checkpointing=checkpointing,
    )
    check(config, theirs)


ROPES = {
    "default": (DefaultRotaryConfig(theta=500.0), {"rope_theta": 500.0}),
    "linear": (LinearRotaryConfig(factor=4.0), {"rope_theta": 10000.0, "factor": 4.0}),
    "llama3": (
        Llama3RotaryConfig(original_max_position_embeddings=32),
        {
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "yarn": (
        YarnRotaryConfig(factor=4.0, original_max_position_embeddings=32),
        {"rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32},
    ),
}


@pytest.mark.parametrize("scaling", ROPES)
@pytest.mark.parametrize(("num_kv_heads", "tied"), [(4, True), (4, False), (2, False), (1, True)])
def test_llama_equals_transformers_beyond_the_original_length(scaling, num_kv_heads, tied):
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    rope, their_rope = ROPES[scaling]
    theirs = LlamaForCausalLM(
        TheirConfig(
            vocab_size=VOCAB,
            hidden_size=48,
            intermediate_size=80,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=num_kv_heads,
            max_position_embeddings=128,
            rope_parameters={"rope_type": scaling, **their_rope},
            tie_word_embeddings=tied,
            attention_bias=True,
            mlp_bias=True,
            rms_norm_eps=1e-5,
        )
    )
    config = LlamaConfig(
        seq_len=128,
        hidden_dim=48,
        intermediate_dim=80,
        num_layers=2,
        num_heads=4,
        num_kv_heads=num_kv_heads,
        tie_word_embeddings=tied,
        use_bias=True,
        rope=rope,
    )
    check(config, theirs)


@pytest.mark.parametrize("scaling", ["llama3", "yarn"])
def test_scaling_changes_the_logits(scaling):
    """Guards the parity above: a scaling that did nothing would also have to do nothing there."""
    scaled = ROPES[scaling][0]
    tokens = torch.arange(64)[None]
    results = []
    for rope in (scaled, DefaultRotaryConfig(theta=scaled.theta)):
        model = LlamaConfig(64, 32, 48, 2, 4, 4, rope=rope).build(VOCAB)
        randomize(model)
        results.append(model(tokens))
    assert (results[0] - results[1]).abs().max() > 0.1
