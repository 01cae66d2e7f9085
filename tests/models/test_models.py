"""Both families: shapes, names, initial values, dropout, masks, refused settings."""

import copy

import pytest
import torch

from ostro import kernels
from ostro.generate.cpu_decoder import in_compute_dtype
from ostro.models import Gpt2Config, LlamaConfig, initialize
from ostro.nn import axes_of
from ostro.nn.rotary import Llama3RotaryConfig, YarnRotaryConfig

VOCAB = 50
GPT2 = Gpt2Config(seq_len=16, hidden_dim=32, num_layers=2, num_heads=4)
LLAMA = LlamaConfig(
    seq_len=16, hidden_dim=32, intermediate_dim=48, num_layers=2, num_heads=4, num_kv_heads=2
)
BOTH = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])


def built(config, seed=0, **kwargs):
    model = config.build(VOCAB, **kwargs)
    initialize(model, seed)
    return model


def tokens(batch=2, length=16, seed=0):
    return torch.randint(VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def replace(config, **changes):
    return type(config)(**{**vars(config), **changes})


def count_parameters(config, vocab_size):
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build(vocab_size).parameters())


def test_gpt2_small_is_gpt2_small():
    assert Gpt2Config().flops_per_token(50257) == 285_255_168
    assert count_parameters(Gpt2Config(), 50257) == 124_439_808


def test_llama_2_7b_has_the_published_number_of_parameters():
    assert count_parameters(LlamaConfig(), 32000) == 6_738_415_616


def test_llama_flops_count_grouped_heads_and_the_gate():
    per_layer = 2 * 3 * 32 * 48 + 2 * 32 * (4 + 4) * 8 + 2 * 32 * 32 + 4 * 16 * 32 + 3 * 16 * 4
    assert LLAMA.flops_per_token(VOCAB) == 2 * per_layer + 2 * 32 * VOCAB


@BOTH
def test_every_parameter_has_axes_of_its_rank(config):
    model = built(config)
    axes = axes_of(model)
    parameters = dict(model.named_parameters())
    assert axes.keys() == parameters.keys()
    for name, parameter in parameters.items():
        assert len(axes[name].names) == parameter.ndim, name
    assert axes["token_embedding.weight"].names == ("vocab", "embed")
    assert not axes["token_embedding.weight"].is_matrix
    assert axes["blocks.1.mlp.down.weight"].names == ("embed", "mlp")
    assert axes["blocks.0.attention.qkv.weight"].names == ("heads", "embed")
    assert not axes["final_norm.weight"].is_matrix
    assert axes_of(copy.deepcopy(model)) == axes


@BOTH
@pytest.mark.parametrize("enabled", [True, False])
def test_the_sum_through_the_blocks_stays_float32(config, enabled):
    """Layers compute in what was asked for; tables can be in that, too, as they are to generate."""
    model, seen, computed = built(config, compute_dtype=torch.bfloat16), [], set()
    for block in model.blocks:
        block.register_forward_hook(lambda _, args, out: seen.extend([args[0], out]))
        for layer in (block.attention, block.mlp):
            layer.register_forward_hook(lambda _, args, out: computed.update([args[0], out]))
    with kernels.scope():
        kernels.enable(enabled)
        model(tokens(), tokens(seed=1)).backward()
        with in_compute_dtype(model), torch.no_grad():
            model(tokens())
    assert {each.dtype for each in seen} == {torch.float32}
    assert {each.dtype for each in computed} == {torch.bfloat16}


@BOTH
def test_initialize_depends_on_seed_and_name_only(config):
    first, second = built(config), built(config)
    pairs = zip(first.state_dict().items(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for (_, a), b in pairs)
    other = built(config, seed=1)
    assert not torch.equal(first.token_embedding.weight, other.token_embedding.weight)
    deeper = built(replace(config, num_layers=3, initializer_range=0.02))
    name = "blocks.1.attention.qkv.weight"
    assert torch.equal(first.state_dict()[name], deeper.state_dict()[name])


@BOTH
def test_initial_deviations(config):
    model = built(replace(config, hidden_dim=128, num_layers=8, initializer_range=0.1))
    parameters = dict(model.named_parameters())
    for name, expected in {
        "token_embedding.weight": 0.1,
        "blocks.3.attention.qkv.weight": 0.1,
        "blocks.3.attention.out.weight": 0.1 / 4,
        "blocks.3.mlp.up.weight": 0.1,
        "blocks.3.mlp.down.weight": 0.1 / 4,
    }.items():
        assert parameters[name].std().item() == pytest.approx(expected, rel=0.05), name
    for name, parameter in parameters.items():
        if "norm" in name or name.endswith("bias"):
            assert (parameter == (1.0 if name.endswith("weight") else 0.0)).all(), name


@BOTH
def test_position_sees_only_earlier_positions(config):
    model = built(config).eval()
    x = tokens()
    y = x.clone()
    y[:, 10:] = (y[:, 10:] + 1) % VOCAB
    first, second = model(x), model(y)
    torch.testing.assert_close(first[:, :10], second[:, :10])
    assert (first[:, 10:] - second[:, 10:]).abs().amax(-1).min() > 1e-4


@BOTH
def test_segments_keep_attention_apart(config):
    model = built(replace(config, initializer_range=0.2)).eval()
    x = tokens()
    segments = torch.zeros(2, 16, dtype=torch.int32)
    segments[:, 8:] = 1
    changed = x.clone()
    changed[:, :8] = (changed[:, :8] + 1) % VOCAB
    torch.testing.assert_close(
        model(x, segments=segments)[:, 8:], model(changed, segments=segments)[:, 8:]
    )
    assert (model(x)[:, 8:] - model(changed)[:, 8:]).abs().max() > 1e-3
    zeros = torch.zeros_like(segments)
    torch.testing.assert_close(model(x, segments=zeros), model(x))


@BOTH
def test_the_loss_agrees_with_the_logits(config):
    model = built(config)
    x, y = tokens(), tokens(seed=1)
    y[0, :5] = -100
    total = model(x, y)
    assert total.dtype == torch.float32
    expected = torch.nn.functional.cross_entropy(
        model(x).flatten(0, 1), y.flatten(), reduction="sum"
    )
    torch.testing.assert_close(total, expected)
    with torch.no_grad():
        torch.testing.assert_close(model(x, y), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_table_and_head_gradients_add_up_over_micro_batches(tied):
    model = built(replace(LLAMA, tie_word_embeddings=tied))
    x, y = tokens(batch=4), tokens(batch=4, seed=1)
    for half in (slice(0, 2), slice(2, 4)):
        loss = model(x[half], y[half])
        loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    logits = model(x).flatten(0, 1)
    torch.nn.functional.cross_entropy(logits, y.flatten(), reduction="sum").backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["tied", "untied"])
def test_gradients_are_handed_over_without_a_copy(config):
    model = built(replace(config, gradient_checkpointing=False))
    loss = model(tokens(), tokens(seed=1))
    made = loss.grad_fn.gradients[1].data_ptr()
    loss.backward()
    assert model.head_weight().grad.data_ptr() == made


@BOTH
def test_bfloat16_compute_keeps_float32_parameters_and_loss(config):
    exact, model = built(config), built(config, compute_dtype=torch.bfloat16)
    assert model(tokens()).dtype == torch.bfloat16
    loss = model(tokens(), tokens(seed=1))
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact(tokens(), tokens(seed=1)), rtol=5e-3, atol=0)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32, name


@BOTH
def test_recomputation_does_not_change_the_gradient(config):
    gradients = []
    for recompute in (False, True):
        model = built(replace(config, gradient_checkpointing=recompute))
        model(tokens(), tokens(seed=1)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


@pytest.mark.parametrize("field", ["embed_pdrop", "resid_pdrop", "attn_pdrop"])
def test_each_dropout_is_applied_in_training_only(field):
    model = built(replace(GPT2, **{field: 0.5, "initializer_range": 0.5}))
    plain = built(replace(GPT2, initializer_range=0.5))
    torch.manual_seed(0)
    assert (model(tokens()) - plain(tokens())).abs().max() > 1e-3
    assert torch.equal(model.eval()(tokens()), plain.eval()(tokens()))


def test_upcast_computes_attention_in_float32():
    results = [
        built(replace(GPT2, upcast_attn=upcast, initializer_range=0.3), compute_dtype=dtype)
        for upcast, dtype in (
            (False, torch.float32), (False, torch.bfloat16), (True, torch.bfloat16)
        )
    ]  # fmt: skip
    exact, low, upcast = (model(tokens()).float() for model in results)
    assert not torch.equal(low, upcast)
    assert (upcast - exact).abs().mean() < 0.2


def test_no_biases_means_none_in_layer_norm_either():
    model = built(replace(GPT2, use_bias=False))
    assert not [name for name, _ in model.named_parameters() if name.endswith("bias")]
    model(tokens(), tokens(seed=1)).backward()


def test_tied_head_has_no_parameter_of_its_own():
    tied, untied = replace(LLAMA, tie_word_embeddings=True), LLAMA
    assert count_parameters(untied, VOCAB) - count_parameters(tied, VOCAB) == VOCAB * 32


@pytest.mark.parametrize(
    ("config", "setting", "words"),
    [
        (Gpt2Config(hidden_dim=100), "num_heads", "must divide hidden_dim = 100"),
        (Gpt2Config(num_layers=0), "num_layers", "positive"),
        (Gpt2Config(seq_len=-1), "seq_len", "positive"),
        (Gpt2Config(resid_pdrop=1.0), "resid_pdrop", "below 1"),
        (Gpt2Config(embed_pdrop=-0.1), "embed_pdrop", "at least 0"),
        (Gpt2Config(activation_function="gelu_nev"), "activation_function", "gelu_new?"),
        (LlamaConfig(num_kv_heads=5), "num_kv_heads", "must divide num_heads = 32"),
        (LlamaConfig(num_kv_heads=0), "num_kv_heads", "positive"),
        (LlamaConfig(hidden_dim=100), "num_heads", "must divide hidden_dim = 100"),
        (LlamaConfig(head_dim=5), "head_dim", "odd"),
        (LlamaConfig(hidden_dim=96), "num_heads", "odd"),
        (LlamaConfig(activation_function="selu"), "activation_function", "must be one of"),
    ],
)
def test_impossible_settings_are_named(config, setting, words):
    found = list(config.problems())
    assert [problem.setting for problem in found] == [setting]
    assert words in f"{found[0].rule} {found[0].advice}"


@pytest.mark.parametrize(
    ("rope", "setting"),
    [
        (Llama3RotaryConfig(high_freq_factor=1.0), "high_freq_factor"),
        (YarnRotaryConfig(beta_fast=0.5), "beta_fast"),
        (YarnRotaryConfig(theta=-1.0), "theta"),
        (YarnRotaryConfig(factor=0.0), "factor"),
    ],
)
def test_impossible_rotary_settings_are_named(rope, setting):
    assert [problem.setting for problem in rope.problems()] == [setting]


def test_defaults_are_possible():
    for config in (Gpt2Config(), LlamaConfig(), GPT2, LLAMA):
        assert not list(config.problems())
