"""Cross-entropy of a linear head without materialising all logits.

The gradient is computed in the forward pass, chunk of rows by chunk of rows: while a chunk's
logits are at hand, the softmax minus the target is multiplied into the gradients of the hidden
states and of the head's weight, and the logits are dropped. The backward pass only scales what
was kept. Peak memory is one chunk of logits instead of three copies of all of them.
"""

import torch
import torch.nn.functional as F

IGNORE = -100
"""Target of a position at which nothing is predicted."""

CHUNK_ELEMENTS = 2**25
"""Logits computed at once: rows per chunk = this / vocabulary size."""


def linear_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, *, reduction: str = "sum"
) -> torch.Tensor:
    """The cross-entropy in nats of `hidden @ weight.T` against `targets`, in float32.

    `hidden` is (..., embed) in the compute dtype, `weight` (vocab, embed) in any dtype, cast to
    that of `hidden`; `targets` int64 (...), `IGNORE` where nothing is predicted. `reduction` is
    "sum" (a scalar over the predicted positions) or "none" (one value each, 0 where ignored,
    without a graph).
    """
    assert reduction in ("sum", "none"), f"unknown reduction {reduction!r}"
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    if reduction == "none":
        with torch.no_grad():
            return _losses(rows, weight.to(rows.dtype), flat).view(targets.shape)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(rows, weight, flat)
    return _losses(rows, weight.to(rows.dtype), flat).sum()


def _num_rows(vocab: int) -> int:
    """Rows of logits that are computed at once."""
    return max(1, CHUNK_ELEMENTS // vocab)


def _losses(rows: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Per-row losses without gradients."""
    size = _num_rows(weight.shape[0])
    return torch.cat([
        F.cross_entropy((part @ weight.T).float(), target, ignore_index=IGNORE, reduction="none")
        for part, target in zip(rows.split(size), targets.split(size), strict=True)
    ])  # fmt: skip


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed loss of (rows, weight, targets), with both gradients made in the forward pass."""

    @staticmethod
    def forward(ctx, rows, weight, targets):
        cast = weight.to(rows.dtype)
        size = _num_rows(weight.shape[0])
        loss = torch.zeros((), device=rows.device)
        grad_rows = torch.empty_like(rows)
        grad_weight = None
        for start in range(0, rows.shape[0], size):
            part, target = rows[start : start + size], targets[start : start + size]
            valid = target != IGNORE
            index = target.clamp(min=0).unsqueeze(1)
            logits = part @ cast.T  # (rows, vocab)
            log_probs = torch.log_softmax(logits, -1, dtype=torch.float32)
            picked = log_probs.gather(1, index).squeeze(1)
            loss -= (picked * valid).sum()
            grad = log_probs.exp_()
            grad.scatter_add_(1, index, grad.new_full(index.shape, -1.0))
            grad.mul_(valid.unsqueeze(1))
            grad = grad.to(rows.dtype)
            torch.mm(grad, cast, out=grad_rows[start : start + size])
            step = grad.T @ part
            grad_weight = step.to(weight.dtype) if grad_weight is None else grad_weight.add_(step)
        ctx.save_for_backward(grad_rows, grad_weight)
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_rows, grad_weight = ctx.saved_tensors
        return grad_rows * grad_loss.to(grad_rows.dtype), grad_weight * grad_loss, None
