"""Cross-entropy of a linear head without materialising all logits.

The gradient is computed in the forward pass, chunk of rows by chunk of rows: while a chunk's
logits are at hand they are turned in place into the softmax minus the target, which is multiplied
into the gradients of the hidden states and of the head's weight. The backward pass only scales
what was kept. Peak memory is one chunk of logits in the compute dtype.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ostro import kernels
from ostro.nn.collectives import Group, local
from ostro.nn.embedding import TiedGradient, first_row

IGNORE = -100
"""Target of a position at which nothing is predicted."""

CHUNK_ELEMENTS = 2**27
"""Logits held at once, at most: rows per chunk = this / vocabulary size."""

CPU_BLOCK = 2**18
"""Logits per thread whose float32 softmax is computed at once on a CPU: they stay in its cache."""

CPU_SLICE = 4096
"""Rows of the head's weight that a matrix product takes at once on a CPU, for the same reason."""


Share = tuple[Group, int]
"""The devices that a vocabulary is split over, and the first token of this one."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    scale: float | Tensor = 1.0,
    tie: TiedGradient | None = None,
    group: Group | None = None,
) -> Tensor:
    """The cross-entropy in nats of `hidden @ weight.T` against `targets`, in float32.

    `hidden` is (..., embed) in the compute dtype, `weight` (vocab, embed) in any dtype, cast to
    that of `hidden`; `targets` int64 (...), `IGNORE` where nothing is predicted. Summed
    over the predicted positions; the graph can be walked back once. The sum is multiplied with
    `scale`: doing it here saves a pass over the gradients. `tie` takes the gradient of a weight
    that is also looked up. Where `weight` is split over a `group`, each device has the whole loss,
    and its part of the gradient of `hidden`.
    """
    rows, flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    part = local(weight)
    tie = tie if part is weight else None
    share = None if group is None else (group, first_row(len(weight), group))
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        return _LinearCrossEntropy.apply(rows, part, flat, scale, tie, share)
    return _loss(rows, part, flat, share) * scale


def _chunk_rows(num_rows: int, vocab: int) -> int:
    """Rows of logits computed at once: equal chunks, none above `CHUNK_ELEMENTS`."""
    num_chunks = -(-num_rows // max(1, CHUNK_ELEMENTS // vocab))
    return -(-num_rows // max(1, num_chunks)) or 1


def _slices(weight: Tensor) -> list[slice]:
    """Ranges of the vocabulary to work on one after another."""
    size = CPU_SLICE if weight.is_cpu else len(weight)
    return [slice(start, start + size) for start in range(0, len(weight), size)]


def _loss(rows: Tensor, weight: Tensor, targets: Tensor, share: Share | None) -> Tensor:
    """The sum without gradients."""
    if share is None:
        return token_losses(rows, weight, targets).sum()
    weight = weight.to(rows.dtype)
    size = max(1, CHUNK_ELEMENTS // 4 // weight.shape[0])
    losses = [
        split_softmax_minus_target_(part @ weight.T, target, 1.0, *share)
        for part, target in zip(rows.split(size), targets.split(size), strict=True)
    ]
    return torch.stack(losses).sum()


def token_losses(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each of the `rows`, (rows,), 0 where nothing is predicted.

    `weight` is cast to the dtype of `rows`. For use without gradients, which would hold on to all
    logits.
    """
    if kernels.gives_loss(rows, weight):
        return kernels.head_loss(rows, weight, targets)
    weight = weight.to(rows.dtype)
    size = max(1, CHUNK_ELEMENTS // 4 // weight.shape[0])
    losses = [
        F.cross_entropy((part @ weight.T).float(), target, ignore_index=IGNORE, reduction="none")
        for part, target in zip(rows.split(size), targets.split(size), strict=True)
    ]
    return torch.cat(losses)


def gradient_memory(weight: Tensor) -> Tensor:
    """Memory for a head's gradient: that of the last update, where `keep_memory` kept it."""
    kept = getattr(weight, "kept_memory", None)
    vars(weight)["kept_memory"] = None  # taken, and to be kept again
    return torch.empty_like(weight) if kept is None else kept


def keep_memory(parameters: Iterable[nn.Parameter]) -> None:
    """Before gradients are forgotten, keep the memory of those of heads on CPUs.

    Its pages would be new to the process in every step, which takes longer than filling them.
    """
    for parameter in parameters:
        if parameter.is_cpu and "kept_memory" in vars(parameter):
            parameter.kept_memory = parameter.grad


class _LinearCrossEntropy(torch.autograd.Function):
    """Summed loss of (rows, weight, targets), with both gradients made in the forward pass."""

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor, scale, tie, share) -> Tensor:
        grad_rows = torch.empty_like(rows)
        grad_weight = gradient_memory(weight) if ctx.needs_input_grad[1] else None
        ctx.gradients, ctx.tie = (grad_rows, grad_weight), tie
        if share is None and kernels.gives_loss(rows, weight):
            gradients = (float(scale), grad_rows, grad_weight)
            return kernels.head_loss(rows, weight, targets, *gradients).sum() * scale
        cast = weight.to(rows.dtype)
        size = _chunk_rows(rows.shape[0], weight.shape[0])
        buffer = rows.new_empty(size, weight.shape[0])
        loss = torch.zeros((), device=rows.device)
        for start in range(0, rows.shape[0], size):
            part, target = rows[start : start + size], targets[start : start + size]
            logits = buffer[: len(part)]  # (rows, vocab)
            for columns in _slices(weight):
                torch.mm(part, cast[columns].T, out=logits[:, columns])
            if share is None:
                loss += softmax_minus_target_(logits, target, scale)
            else:
                loss += split_softmax_minus_target_(logits, target, scale, *share)
            torch.mm(logits, cast, out=grad_rows[start : start + size])
            if grad_weight is None:
                continue
            for columns in _slices(weight):
                step = logits[:, columns].T @ part
                if start == 0:
                    grad_weight[columns] = step
                else:  # summed over chunks in the wider type; `+=` would copy the slice once more
                    grad_weight[columns].add_(step.to(weight.dtype))
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_loss: Tensor):
        assert ctx.gradients is not None, "the backward pass of the loss runs once"
        (grad_rows, grad_weight), ctx.gradients = ctx.gradients, None
        # On a CPU looking at the value does not wait; on others multiplying by one is cheap.
        if not (type(grad_loss) is Tensor and grad_loss.is_cpu and grad_loss == 1):
            grad_rows.mul_(grad_loss)
            if grad_weight is not None:
                grad_weight.mul_(grad_loss)
        if ctx.tie is not None and ctx.tie.wanted:
            ctx.tie.gradient = grad_weight
        return grad_rows, grad_weight, None, None, None, None


def softmax_minus_target_(logits: Tensor, targets: Tensor, scale: float | Tensor = 1.0) -> Tensor:
    """Turn logits (rows, vocab) in place into the gradient of the summed loss times `scale`.

    Returns that loss. Rows whose target is `IGNORE` become 0. The arithmetic is float32 whatever
    the logits are.
    """
    num_rows, vocab = logits.shape
    valid = (targets != IGNORE).unsqueeze(1).float() * scale  # 0 where nothing is predicted
    at = targets.clamp(min=0) + torch.arange(0, num_rows * vocab, vocab, device=logits.device)
    flat = logits.view(-1)
    picked = flat[at].unsqueeze(1).float()
    largest, total = torch.empty_like(picked), torch.empty_like(picked)
    size = num_rows
    if logits.is_cpu:
        size = torch.get_num_threads() * max(1, CPU_BLOCK // vocab)
    scratch = torch.empty(min(size, num_rows), vocab, device=logits.device)
    for start in range(0, num_rows, size):
        block = slice(start, start + size)
        given = logits[block]
        x = given if given.dtype == torch.float32 else scratch[: len(given)].copy_(given)
        torch.amax(x, 1, keepdim=True, out=largest[block])
        x.sub_(largest[block]).exp_()
        torch.sum(x, 1, keepdim=True, out=total[block])
        x.mul_(valid[block] / total[block])
        if x is not given:
            given.copy_(x)
    distance = picked - largest
    flat[at] = ((distance.exp() / total - 1) * valid).squeeze(1).to(logits.dtype)
    return ((total.log() - distance) * valid).sum()


def split_softmax_minus_target_(
    logits: Tensor, targets: Tensor, scale: float | Tensor, group: Group, first: int
) -> Tensor:
    """`softmax_minus_target_` of logits of which this device has the columns from `first` on."""
    vocab = logits.shape[1]
    valid = (targets != IGNORE).unsqueeze(1).float() * scale
    own = targets - first
    is_here = ((own >= 0) & (own < vocab)).unsqueeze(1)
    index = own.clamp(0, vocab - 1).unsqueeze(1)
    x = logits.float()
    largest = group.max(x.amax(1, keepdim=True))
    x = x - largest
    sums = torch.stack([x.exp().sum(1, keepdim=True), x.gather(1, index) * is_here])
    total, distance = group.sum(sums)
    gradient = x.exp_().mul_(valid / total)
    gradient.scatter_add_(1, index, -(valid * is_here))
    logits.copy_(gradient)
    return ((total.log() - distance) * valid).sum()
