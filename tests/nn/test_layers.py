"""Layers: dtype rules, axis names, attention against a plain formula."""

import pytest
import torch

from ostro.nn import Embedding, LayerNorm, Linear, RMSNorm, initialize
from ostro.nn.attention import _attend_up_to_end, causal_attention, segment_mask
from ostro.nn.rotary import DefaultRotaryConfig, apply_rotary


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_compute_in_one_dtype_and_norms_sum_in_float32(dtype):
    x = torch.randn(3, 8).to(dtype)
    for layer in (
        Linear(("embed", 8), ("mlp", 12)),
        LayerNorm(("embed", 8), eps=1e-5, bias=True, dtype=dtype),
        RMSNorm(("embed", 8), eps=1e-5, bias=False, dtype=dtype),
    ):
        initialize(layer, 0)
        y = layer(x)
        if not isinstance(layer, Linear):
            total, y = layer(x.float(), x)
            assert total.dtype == torch.float32 and torch.equal(total, 2 * x.float())
        assert y.dtype == dtype
        y.float().sum().backward()
        assert all(p.grad.dtype == torch.float32 for p in layer.parameters())


@pytest.mark.parametrize(("kind", "bias"), [(LayerNorm, True), (RMSNorm, False)])
def test_norm_statistics_are_float32(kind, bias):
    x = torch.randn(4, 512) * 3 + 100
    layers = [
        kind(("embed", 512), eps=1e-5, bias=bias, dtype=dtype)
        for dtype in (torch.bfloat16, torch.float32)
    ]
    for layer in layers:
        initialize(layer, 0)
    normed, expected = (layer(x)[1].float() for layer in layers)
    assert 0 < (normed - expected).abs().max() <= expected.abs().max() / 256


def test_linear_is_out_by_in_and_names_its_dims():
    layer = Linear(("embed", 8), ("mlp", 12), bias=False)
    assert layer.weight.shape == (12, 8) and layer.bias is None
    assert layer.parameter_axes["weight"].names == ("mlp", "embed")
    table = Embedding(("vocab", 10), ("embed", 8))
    assert table.parameter_axes["weight"].names == ("vocab", "embed")


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_the_plain_formula(kv_heads, masked):
    query = torch.randn(2, 4, 9, 8, dtype=torch.float64)
    key, value = torch.randn(2, 2, kv_heads, 9, 8, dtype=torch.float64)
    segments = torch.tensor([[0] * 5 + [1] * 4, [0] * 9])
    mask = segment_mask(segments) if masked else None
    found = causal_attention(query, key, value, scale=0.3, mask=mask)
    keys, values = (x.repeat_interleave(4 // kv_heads, 1) for x in (key, value))
    logits = 0.3 * query @ keys.transpose(-1, -2)
    allowed = mask if masked else torch.ones(9, 9).tril().bool()
    expected = logits.masked_fill(~allowed, -torch.inf).softmax(-1) @ values
    torch.testing.assert_close(found, expected)


def test_rotary_logits_depend_on_distance_only():
    config = DefaultRotaryConfig()
    query, key = torch.randn(2, 16, dtype=torch.float64)

    def logit(p, q):
        cos, sin = config.tables(torch.tensor([p, q]), 16)
        return apply_rotary(query, cos[0], sin[0]) @ apply_rotary(key, cos[1], sin[1])

    torch.testing.assert_close(logit(3, 1), logit(30, 28), rtol=1e-4, atol=1e-4)
    assert (logit(3, 1) - logit(3, 2)).abs() > 1e-3


@pytest.mark.parametrize("before", [0, 5, 32])
def test_the_last_queries_of_a_sequence_attend_as_with_a_mask(before):
    query = torch.randn(2, 4, 16, 8)
    key, value = torch.randn(2, 2, 2, 16 + before, 8)
    mask = torch.ones(16, 16 + before, dtype=torch.bool).tril(before)
    found = []
    for function in (
        lambda q, k, v: causal_attention(q, k, v, scale=0.3, mask=mask),
        lambda q, k, v: _attend_up_to_end(q, k, v, 0.3, upcast=False),
    ):
        inputs = [t.clone().requires_grad_() for t in (query, key, value)]
        result = function(*inputs)
        (result * torch.arange(16.0)[:, None]).sum().backward()
        found.append([result, *(each.grad for each in inputs)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
