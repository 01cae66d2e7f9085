"""Muon: hidden matrices move along their orthogonalised momentum, all other parameters by AdamW."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ostro.core.axes import VOCAB, ParameterAxes
from ostro.core.errors import Problem
from ostro.optim.config import (
    AdamConfig,
    NamedParameters,
    OptimizerConfig,
    adamw,
    parameter_groups,
)

_QUINTIC = (3.4445, -4.7750, 2.0315)  # Jordan's: steep at 0, so that few steps are enough
_MAX_STACKED = 2**24  # elements of matrices that are gathered and orthogonalised at once


@OptimizerConfig.register_subclass("muon")
@dataclass(frozen=True)
class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices between
    activations of the blocks; AdamW for embeddings, head, norms and biases.
    """

    needs_matrices: ClassVar[bool] = True

    momentum: float = 0.95
    """Decay of the running mean of a matrix's gradients."""
    nesterov: bool = True
    """Look ahead: orthogonalise the mean of the gradient and the running mean."""
    ns_steps: int = 5
    """Newton-Schulz iterations of an update."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How large an update of a matrix of (rows, columns) is. match_rms_adamw: `learning_rate` times
    0.2 sqrt(max(rows, columns)), about as large as AdamW's, so that both take the same learning
    rates (arXiv:2502.16982). original: times sqrt(max(1, rows / columns)); 0.02 is usual."""
    adam_lr_ratio: float = 1.0
    """AdamW's learning rate as a multiple of `learning_rate`."""
    beta1: float = 0.9
    """AdamW's decay of the running mean of gradients."""
    beta2: float = 0.95
    """AdamW's decay of the running mean of squared gradients."""
    epsilon: float = 1e-8
    """AdamW's: added to the root of the squared gradients, after bias correction."""

    def problems(self) -> Iterator[Problem]:
        """What is wrong whatever the length of the run."""
        shared = {field.name: getattr(self, field.name) for field in fields(AdamConfig)}
        yield from AdamConfig(**shared).problems()
        if not 0 <= self.momentum < 1:
            yield Problem("momentum", "must be at least 0 and below 1")
        if self.ns_steps < 1:
            yield Problem("ns_steps", "must be at least 1", "5 is usual")
        if not 0 <= self.adam_lr_ratio < float("inf"):
            yield Problem("adam_lr_ratio", "must be finite and not negative")

    def build(
        self, parameters: NamedParameters, split: Mapping[str, Tensor] | None = None
    ) -> torch.optim.Optimizer:
        """`Muon`; matrices that are split over ranks are gathered for every update."""
        is_muon = {
            parameter: axes.is_matrix and VOCAB not in axes.names
            for parameter, axes in parameters.values()
        }
        kinds = {True: [], False: []}
        for group in parameter_groups(self, parameters):
            for kind, groups in kinds.items():
                own = [p for p in group["params"] if is_muon[p] is kind]
                groups.append({**group, "params": own})
        for group in kinds[False]:
            group["lr_ratio"] = self.adam_lr_ratio
        layouts = {
            parameter: _Layout(axes, (split or {}).get(name))
            for name, (parameter, axes) in parameters.items()
            if is_muon[parameter]
        }
        return Muon(kinds[True], adamw(self, kinds[False]), layouts, self)


@dataclass(frozen=True)
class _Layout:
    """How the matrices in a parameter are found."""

    axes: ParameterAxes
    whole: Any
    """The DTensor that the parameter is this rank's part of; None where it is all of it."""

    def gather(self, part: Tensor) -> Tensor:
        """The whole of what is split as the parameter is; all ranks together."""
        if self.whole is None:
            return part
        like = self.whole
        shape = {"shape": like.shape, "stride": like.stride()}
        return like.from_local(part, like.device_mesh, like.placements, **shape).full_tensor()

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of it again. No communication."""
        if self.whole is None:
            return whole
        from torch.distributed.tensor import distribute_tensor  # takes time to import

        mesh, placements = self.whole.device_mesh, self.whole.placements
        return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()

    def matrices(self, whole: Tensor) -> Sequence[Tensor]:
        """Views of the matrices of layers that share a parameter, such as queries, keys, values:
        (heads, share, rows, columns)."""
        heads, fused = self.axes.num_heads or 1, self.axes.fused
        return whole.view(heads, sum(fused), -1, whole.shape[1]).split(fused, 1)


class Muon(torch.optim.Optimizer):
    """Steps matrices by Muon, and the groups of an AdamW after its own.

    As torch's fused optimizers do, it reads `grad_scale` and `found_inf` on the device.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        adam: torch.optim.AdamW,
        layouts: Mapping[nn.Parameter, _Layout],
        config: MuonConfig,
    ):
        defaults = {"lr": config.learning_rate, "fused": True, "momentum": config.momentum}
        super().__init__(groups, defaults)
        self._adam, self._layouts, self._config = adam, layouts, config
        self._portions = [(g, part) for g in self.param_groups for part in self._cut(g["params"])]
        self.param_groups += adam.param_groups
        self.state = adam.state
        for parameter in layouts:
            self.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}

    def _cut(self, parameters: list[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
        """What is gathered and orthogonalised together."""
        portion, size = [], 0
        for parameter in parameters:
            whole = self._layouts[parameter].whole
            count = (parameter if whole is None else whole).numel()
            if portion and size + count > _MAX_STACKED:
                yield portion
                portion, size = [], 0
            portion.append(parameter)
            size += count
        yield portion

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all parameters once, unless `found_inf` is set."""
        masks = {name: getattr(self, name, None) for name in ("grad_scale", "found_inf")}
        for group, parameters in self._portions:
            self._step_matrices(group, parameters, **masks)
        vars(self._adam).update(masks)
        self._adam.step()

    def _step_matrices(
        self,
        group: dict[str, Any],
        parameters: list[nn.Parameter],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        momentum, decay = group["momentum"], group["lr"] * group["weight_decay"]
        keep: Any = 1.0 if found_inf is None else 1.0 - found_inf
        updates = []
        for parameter in parameters:
            buffer, grad = self.state[parameter]["momentum_buffer"], parameter.grad
            assert grad is not None, "a matrix has no gradient"
            if grad_scale is not None:
                grad = grad / grad_scale
            if found_inf is not None:  # what is not finite would stay so times 0
                grad = grad.masked_fill(found_inf != 0, 0.0)
            buffer.add_((grad - buffer) * ((1 - momentum) * keep))
            update = grad + (buffer - grad) * momentum if self._config.nesterov else buffer
            updates.append(self._layouts[parameter].gather(update))
        layouts = [self._layouts[parameter] for parameter in parameters]
        pairs = zip(layouts, updates, strict=True)
        matrices = [m.flatten(0, 2) for layout, update in pairs for m in layout.matrices(update)]
        moves = orthogonalize_all(matrices, self._config.ns_steps)
        for parameter, layout, update in zip(parameters, layouts, updates, strict=True):
            whole = torch.empty_like(update)
            for into in layout.matrices(whole):
                move = next(moves)
                rate = group["lr"] * _adjusted(self._config.adjust_lr, *move.shape)
                into.copy_(move.view(into.shape)).mul_(rate * keep)
            if decay:
                parameter.mul_(1 - decay * keep)
            parameter.sub_(layout.part(whole))


def _adjusted(how: str, rows: int, columns: int) -> float:
    if how == "original":
        return max(1.0, rows / columns) ** 0.5
    return 0.2 * max(rows, columns) ** 0.5


def orthogonalize_all(matrices: Sequence[Tensor], num_steps: int) -> Iterator[Tensor]:
    """`orthogonalize` of matrices of several shapes, those of one shape together."""
    by_shape = defaultdict(list)
    for index, matrix in enumerate(matrices):
        by_shape[min(matrix.shape), max(matrix.shape)].append(index)
    found: dict[int, Tensor] = {}
    for indices in by_shape.values():
        stack = torch.stack([_wide(matrices[index]) for index in indices])
        found |= zip(indices, orthogonalize(stack, num_steps), strict=True)
    for index, matrix in enumerate(matrices):
        yield found[index] if found[index].shape == matrix.shape else found[index].mT


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[0] > matrix.shape[1] else matrix


def orthogonalize(matrices: Tensor, num_steps: int = 5) -> Tensor:
    """Nearly the orthogonal factors U V^T of matrices U S V^T, (count, rows, columns).

    Jordan's Newton-Schulz iteration in bfloat16: singular values come out between about 0.7 and
    1.2, very small ones below. Cheapest with no more rows than columns.
    """
    norm = torch.linalg.matrix_norm(matrices, keepdim=True).clamp(min=1e-7)
    x = (matrices / norm).bfloat16()
    a, b, c = _QUINTIC
    for _ in range(num_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x
