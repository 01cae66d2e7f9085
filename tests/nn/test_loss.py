"""The chunked loss against torch's own on whole logits."""

import pytest
import torch
import torch.nn.functional as F

from ostro.nn import loss as loss_module
from ostro.nn.loss import linear_cross_entropy


def inputs(dtype=torch.float32, rows=23, vocab=40, embed=16):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, embed, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(vocab, embed, generator=generator).requires_grad_()
    targets = torch.randint(vocab, (rows,), generator=generator)
    targets[3:6] = -100
    return hidden, weight, targets


def whole(hidden, weight, targets):
    logits = F.linear(hidden, weight.to(hidden.dtype)).float()
    return F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")


@pytest.mark.parametrize("rows_at_once", [1, 5, 23, 100])
def test_value_and_gradients_in_chunks(monkeypatch, rows_at_once):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 40 * rows_at_once)
    hidden, weight, targets = inputs()
    ours = linear_cross_entropy(hidden, weight, targets)
    gradients = torch.autograd.grad(3 * ours, (hidden, weight))
    theirs = whole(hidden, weight, targets)
    expected = torch.autograd.grad(3 * theirs, (hidden, weight))
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, targets), theirs)


def test_bfloat16_is_as_good_as_whole_logits(monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", 40 * 4)
    hidden, weight, targets = inputs(torch.float32)
    exact = torch.autograd.grad(whole(hidden, weight, targets), (hidden, weight))
    hidden, weight, targets = inputs(torch.bfloat16)
    errors = []
    for function in (linear_cross_entropy, whole):
        found = torch.autograd.grad(function(hidden, weight, targets), (hidden, weight))
        assert found[0].dtype == torch.bfloat16 and found[1].dtype == torch.float32
        errors.append([(a - b).norm() / b.norm() for a, b in zip(found, exact, strict=True)])
    assert all(ours < 1.2 * theirs for ours, theirs in zip(*errors, strict=True))


def test_only_the_hidden_states_may_want_a_gradient():
    hidden, weight, targets = inputs()
    linear_cross_entropy(hidden, weight.detach(), targets).backward()
    assert hidden.grad.abs().sum() > 0


def test_all_ignored_gives_zero_and_zero_gradients():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden, weight, torch.full_like(targets, -100))
    loss.backward()
    assert loss.item() == 0 and not hidden.grad.any() and not weight.grad.any()


def test_large_logits_stay_finite():
    hidden, weight, targets = inputs()
    loss = linear_cross_entropy(hidden * 1e4, weight, targets)
    loss.backward()
    assert loss.isfinite() and weight.grad.isfinite().all()
