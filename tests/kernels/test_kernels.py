"""The C++ kernels against float32 arithmetic of torch on the same values."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ostro import kernels
from ostro.models import Gpt2Config, LlamaConfig, initialize
from ostro.nn.loss import keep_memory
from ostro.nn.norm import LayerNorm, RMSNorm
from ostro.nn.rotary import turn_fused

needs_kernels = pytest.mark.skipif(
    not kernels.available(), reason=kernels.unavailable_reason() or "runs"
)


@pytest.fixture(params=[torch.bfloat16, torch.float32], ids=["bfloat16", "float32"])
def dtype(request):
    kernels.enable(True)
    return request.param


def noise(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return (torch.randn(*shape) * scale).to(dtype)


def assert_close(found: Tensor, expected: Tensor, limit: float) -> None:
    """`limit` is for bfloat16; float32 comes a thousand times as near."""
    assert distance(found, expected) < (limit if found.dtype == torch.bfloat16 else limit / 1000)


def distance(found: Tensor, expected: Tensor) -> float:
    """Norm of the difference over that of what was expected."""
    return ((found.float() - expected).norm() / expected.norm()).item()


@needs_kernels
@pytest.mark.parametrize(
    ("batch", "position", "heads", "group", "size"),
    [
        (2, 128, 2, 1, 64),
        (1, 200, 3, 2, 32),
        (2, 5, 1, 4, 16),
        (3, 64, 2, 1, 32),
        (1, 300, 1, 1, 80),
    ],
)
def test_attention_and_its_gradient(batch, position, heads, group, size, dtype):
    torch.manual_seed(0)
    qkv = noise(batch, position, heads, group + 2, size, dtype=dtype).requires_grad_()
    upstream = noise(batch, position, heads * group * size, dtype=dtype)
    out = kernels.attention(qkv, 0.2)
    assert out is not None
    out.backward(upstream)
    wide = qkv.detach().float().requires_grad_()
    query, key, value = wide[:, :, :, :-2].flatten(2, 3), wide[:, :, :, -2], wide[:, :, :, -1]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    expected = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.2, enable_gqa=True
    )
    expected = expected.transpose(1, 2).flatten(2)
    expected.backward(upstream.float())
    assert_close(out, expected, 0.003)
    assert_close(qkv.grad, wide.grad, 0.004)


@needs_kernels
def test_large_scores_do_not_overflow(dtype):
    qkv = noise(1, 150, 2, 3, 16, scale=30.0, dtype=dtype).requires_grad_()
    out = kernels.attention(qkv, 1.0)
    out.sum().backward()
    assert out.isfinite().all()
    assert qkv.grad.isfinite().all()


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "ins", "outs", "bias"),
    [(70, 64, 48, True), (600, 128, 400, False), (1300, 1040, 272, True)],
)
def test_a_linear_layer_and_its_gradients(rows, ins, outs, bias, dtype):
    torch.manual_seed(0)
    x = noise(rows, ins, dtype=dtype).requires_grad_()
    upstream = noise(rows, outs, dtype=dtype)
    weight = torch.randn(outs, ins).mul_(0.05).requires_grad_()
    offset = torch.randn(outs).requires_grad_() if bias else None
    y = kernels.linear(x, weight, offset)
    assert y is not None
    y.backward(upstream)
    wide = x.detach().float().requires_grad_()
    rounded = weight.detach().to(dtype).float().requires_grad_()
    again = None if offset is None else offset.detach().clone().requires_grad_()
    expected = F.linear(wide, rounded, again)
    expected.backward(upstream.float())
    assert_close(y, expected, 0.003)
    assert_close(x.grad, wide.grad, 0.003)
    assert distance(weight.grad, rounded.grad) < 1e-5  # sums are never rounded
    if again is not None:
        assert distance(offset.grad, again.grad) < 1e-5


@needs_kernels
def test_results_do_not_depend_on_the_number_of_threads(dtype):
    torch.manual_seed(0)
    x, weight = noise(300, 96, dtype=dtype), torch.randn(400, 96, requires_grad=True)
    qkv, targets = noise(1, 200, 3, 3, 32, dtype=dtype), torch.randint(400, (300,))
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        grads = torch.empty_like(x), torch.empty_like(weight)
        y = kernels.linear(x, weight, None)
        losses = kernels.head_loss(x, weight, targets, 1.0, *grads, chunk=128)
        weight.grad = None
        y.square().sum().backward()
        found.append([y, weight.grad, kernels.attention(qkv, 0.1), losses, *grads])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))


@needs_kernels
@pytest.mark.parametrize(
    ("rows", "vocab", "embed"), [(100, 65, 64), (70, 1000, 32), (300, 96, 128)]
)
def test_the_loss_of_the_head_and_its_gradients(rows, vocab, embed, dtype):
    torch.manual_seed(0)
    hidden, weight = noise(rows, embed, dtype=dtype), torch.randn(vocab, embed) * 0.2
    targets = torch.randint(vocab, (rows,))
    targets[::7] = -100
    grads = torch.empty_like(hidden), torch.empty_like(weight)
    losses = kernels.head_loss(hidden, weight, targets, 0.5, *grads, chunk=64)
    wide = hidden.float().requires_grad_()
    rounded = weight.to(dtype).float().requires_grad_()
    expected = F.cross_entropy(wide @ rounded.T, targets, ignore_index=-100, reduction="none")
    (0.5 * expected.sum()).backward()
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
    assert_close(grads[0], wide.grad, 0.004)
    assert distance(grads[1], rounded.grad) < (0.003 if dtype == torch.bfloat16 else 3e-6)


@needs_kernels
def test_activations_and_their_gradients(dtype):
    x = noise(3, 77, scale=3.0, dtype=dtype).requires_grad_()
    up = noise(3, 77, dtype=dtype).requires_grad_()
    wide, other = (t.detach().float().requires_grad_() for t in (x, up))
    kernels.gelu(x).sum().backward()
    F.gelu(wide, approximate="tanh").sum().backward()
    assert_close(x.grad, wide.grad, 0.003)
    x.grad = wide.grad = None
    kernels.silu_gate(x, up).sum().backward()
    (F.silu(wide) * other).sum().backward()
    assert_close(x.grad, wide.grad, 0.003)
    assert_close(up.grad, other.grad, 0.003)


@needs_kernels
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("family", [Gpt2Config, LlamaConfig])
def test_a_model_learns_the_same_with_and_without(family, recompute, dtype):
    config = family(seq_len=48, hidden_dim=64, num_layers=2, num_heads=4)
    config = replace(config, gradient_checkpointing=recompute)
    if isinstance(config, LlamaConfig):
        config = replace(config, intermediate_dim=96, num_kv_heads=2, tie_word_embeddings=True)
    torch.manual_seed(0)
    tokens = torch.randint(65, (3, 48))
    found = []
    for wanted in (True, False):
        model = config.build(65, dtype)
        initialize(model, 0)
        kernels.enable(wanted)
        try:
            loss = model(tokens[:, :-1], tokens[:, 1:], scale=1 / 141)
            loss.backward()
        finally:
            kernels.enable(None)
        found.append((loss.item(), [p.grad for p in model.parameters()]))
    (ours, gradients), (theirs, expected) = found
    assert not all(map(torch.equal, gradients, expected)), "the kernels were not used"
    limit = 0.03 if dtype == torch.bfloat16 else 1e-5
    assert abs(ours - theirs) < limit / 10
    for grad, other in zip(gradients, expected, strict=True):
        assert distance(grad, other) < limit


def test_without_a_compiler_torch_does_the_work(tmp_path):
    program = (
        "import torch; from ostro import kernels\n"
        "assert not kernels.available()\n"
        "assert kernels.linear(torch.ones(64, 16).bfloat16(), torch.ones(16, 16), None) is None\n"
        "print(kernels.unavailable_reason())"
    )
    environment = {**os.environ, "CXX": "no-such-compiler", "OSTRO_CACHE_HOME": str(tmp_path)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "no C++ compiler (no-such-compiler)" in done.stdout or "CPU" in done.stdout


@needs_kernels
@pytest.mark.parametrize("adds", [True, False])
@pytest.mark.parametrize(
    "kind", [partial(RMSNorm, bias=False), *(partial(LayerNorm, bias=b) for b in (True, False))]
)
def test_norms_and_their_gradients(kind, adds, dtype):
    """Also of what they add, and of the sum that goes on."""
    torch.manual_seed(0)
    x, added = torch.randn(3, 50, 96) + 2, noise(3, 50, 96, dtype=dtype)
    back = torch.randn(3, 50, 96), noise(3, 50, 96, dtype=dtype)
    norm = kind(("embed", 96), eps=1e-5, dtype=dtype)
    for parameter in norm.parameters():
        parameter.data = torch.randn(96).to(dtype).float()
    found = []
    for wanted in (True, False):
        kernels.enable(wanted)
        norm.zero_grad()
        inputs = [x.clone().requires_grad_()] + [added.clone().requires_grad_()] * adds
        total, normed = norm(*inputs)
        assert (type(total.grad_fn).__name__ == "_NormBackward") == wanted
        torch.autograd.backward([total, normed], back)
        gradients = [each.grad for each in (*inputs, *norm.parameters())]
        assert [total.dtype, normed.dtype] == [torch.float32, dtype]
        found.append([total, normed, *gradients])
    for ours, theirs in zip(*found, strict=True):
        assert distance(ours, theirs) < (0.004 if dtype == torch.bfloat16 else 4e-6)
    assert torch.equal(found[0][0], found[1][0])


@needs_kernels
def test_rotary_positions_and_their_gradients(dtype):
    torch.manual_seed(0)
    qkv = noise(2, 9, 2, 4, 32, dtype=dtype).requires_grad_()
    back = noise(2, 9, 2, 4, 32, dtype=dtype)
    angles = torch.randn(1, 9, 1, 1, 16)
    found = []
    for wanted in (True, False):
        kernels.enable(wanted)
        qkv.grad = None
        turned = turn_fused(qkv, angles.cos(), angles.sin())
        turned.backward(back)
        found.append([turned, qkv.grad])
    for ours, theirs in zip(*found, strict=True):
        assert_close(ours, theirs.float(), 0.005)
    assert torch.equal(turned[:, :, :, 3], qkv[:, :, :, 3])


@needs_kernels
def test_a_profile_has_the_kernels():
    with torch.profiler.profile() as profiler:
        kernels.gelu(noise(4, 16))
    assert "ostro::gelu_forward" in {event.key for event in profiler.key_averages()}


@needs_kernels
def test_the_norms_of_gradients():
    grads = [torch.randn(70_000, generator=torch.Generator().manual_seed(0)), torch.ones(3, 5)]
    assert kernels.norms(grads) is None  # nobody has said that this process uses kernels
    kernels.enable(True)
    torch.testing.assert_close(kernels.norms(grads), torch.stack(torch._foreach_norm(grads)))
    assert kernels.norms([grads[0][::2]]) is None


@needs_kernels
def test_float32_is_for_kernels_where_that_was_said():
    assert kernels.gelu(noise(4, 16)) is not None and kernels.gelu(torch.ones(4, 16)) is None
    kernels.enable(True)
    assert kernels.gelu(torch.ones(4, 16)) is not None
    kernels.enable(False)
    assert kernels.gelu(noise(4, 16)) is None and kernels.gelu(torch.ones(4, 16)) is None


@needs_kernels
def test_adamw_is_a_kernel_where_that_was_said():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([weight])
    optimizer.step()  # makes its state
    before = weight.tolist()
    assert not kernels.adamw(optimizer, None) and weight.tolist() == before
    kernels.enable(True)
    assert kernels.adamw(optimizer, None) and weight.tolist() != before
    optimizer.param_groups[0]["maximize"] = True
    assert not kernels.adamw(optimizer, None)


@needs_kernels
def test_what_is_not_a_number_stays_so(dtype):
    """Otherwise a run that diverges would not be noticed."""
    x, weight = noise(40, 32, dtype=dtype), torch.randn(65, 32)
    qkv = noise(1, 20, 2, 3, 16, dtype=dtype)
    x[3, 5] = qkv[0, 4, 1, 2, 3] = torch.nan
    assert kernels.head_loss(x, weight, torch.zeros(40, dtype=torch.int64))[3].isnan()
    assert kernels.linear(x, weight[:64], None)[3].isnan().all()
    assert kernels.gelu(x)[3, 5].isnan() and kernels.silu_gate(x, x)[3, 5].isnan()
    for is_centred in (True, False):
        kind = {"dtype": dtype, "is_centred": is_centred}
        total, normed = kernels.normalise(x.float(), x, torch.ones(32), None, 1e-5, **kind)
        assert total[3, 5].isnan() and normed[3].isnan().all()
    out = kernels.attention(qkv, 0.2).view(1, 20, 2, 16)
    assert out[0, 4:, 1, 3].isnan().all()
    assert kernels.norms([x[3].float()]).isnan()


def test_memory_of_gradients_is_kept_for_heads_only():
    config = LlamaConfig(seq_len=16, hidden_dim=32, num_layers=1, num_heads=2, num_kv_heads=2)
    model = replace(config, intermediate_dim=32).build(65)
    initialize(model, 0)
    tokens = torch.randint(65, (2, 16))
    for _ in range(2):
        model(tokens, tokens).backward()
        keep_memory(model.parameters())
        kept = {n: p.kept_memory for n, p in model.named_parameters() if hasattr(p, "kept_memory")}
        assert list(kept) == ["head.weight"]
        assert kept.pop("head.weight") is model.head.weight.grad
        at = model.head.weight.grad.data_ptr()
        model.zero_grad(set_to_none=True)
    model(tokens, tokens).backward()
    assert model.head.weight.grad.data_ptr() == at
