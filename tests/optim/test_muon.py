"""Muon: orthogonal updates of matrices, AdamW for the rest, masked and resumed as any optimizer."""

import math

import pytest
import torch
from test_update import make_parameters, set_gradients
from torch import nn

from ostro.core.axes import EMBED, MLP, VOCAB, ParameterAxes
from ostro.models import Gpt2Config, LlamaConfig
from ostro.nn import axes_of
from ostro.optim import (
    AdamConfig,
    MuonConfig,
    apply_update,
    clip_scale,
    gradient_norm,
    optimizer_tensors,
    set_learning_rate,
)
from ostro.optim.muon import orthogonalize, orthogonalize_all

MATRIX = ParameterAxes((MLP,), (EMBED,))


def random_matrix(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def build(config: MuonConfig, **weights: tuple[torch.Tensor, ParameterAxes]):
    """The parameters and Muon over them."""
    parameters = {name: (nn.Parameter(w.clone()), axes) for name, (w, axes) in weights.items()}
    return {name: parameter for name, (parameter, _) in parameters.items()}, config.build(
        parameters
    )


@pytest.mark.parametrize("shape", [(1, 16, 16), (3, 8, 40), (2, 40, 8)])
def test_newton_schulz_gives_nearly_orthogonal_matrices(shape):
    matrices = random_matrix(*shape)
    found = orthogonalize(matrices, num_steps=8).double()
    left, values, right = torch.linalg.svd(found, full_matrices=False)
    assert values.min() > 0.6 and values.max() < 1.3
    # The singular vectors stay: it is near the orthogonal factor of the matrix.
    left, _, right = torch.linalg.svd(matrices.double(), full_matrices=False)
    cosine = (found * (left @ right)).sum((1, 2)) / found.norm(dim=(1, 2)) / shape[-1] ** 0.5
    cosine *= (shape[-1] / min(shape[1:])) ** 0.5
    assert cosine.min() > 0.97
    assert orthogonalize(torch.zeros(1, 4, 4)).abs().max() == 0


def test_matrices_of_several_shapes_are_taken_together():
    shapes = [(4, 6), (6, 4), (5, 5), (4, 6)]
    matrices = [random_matrix(*shape, seed=i) for i, shape in enumerate(shapes)]
    for matrix, found in zip(matrices, orthogonalize_all(matrices, 5), strict=True):
        assert found.shape == matrix.shape
        alone = orthogonalize(matrix[None], 5)[0]
        torch.testing.assert_close(found, alone, rtol=0, atol=0.03)


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_a_matrix_moves_as_with_torch(adjust_lr, nesterov):
    weight = random_matrix(24, 8)
    config = MuonConfig(
        weight_decay=0.3, momentum=0.8, nesterov=nesterov, ns_steps=4, adjust_lr=adjust_lr
    )
    weights, optimizer = build(config, up=(weight, MATRIX))
    theirs = nn.Parameter(weight.clone())
    options = {"momentum": 0.8, "nesterov": nesterov, "ns_steps": 4, "adjust_lr_fn": adjust_lr}
    reference = torch.optim.Muon([theirs], lr=0.05, weight_decay=0.3, **options)
    for step in range(5):
        weights["up"].grad = random_matrix(24, 8, seed=step + 1)
        theirs.grad = weights["up"].grad.clone()
        set_learning_rate(optimizer, 0.05)
        apply_update(optimizer, None, None)
        reference.step()
    moved = (theirs.detach() - weight).norm()
    assert (weights["up"].detach() - theirs.detach()).norm() < 0.01 * moved
    assert moved > 0.1


def test_all_but_hidden_matrices_go_to_adamw():
    config = MuonConfig(weight_decay=0.1, adam_lr_ratio=0.5)
    parameters, same = make_parameters(), make_parameters()
    head = ParameterAxes((VOCAB,), (EMBED,))
    for each in (parameters, same):
        each["head.weight"] = nn.Parameter(random_matrix(7, 4)), head
    optimizer, adam = config.build(parameters), AdamConfig(weight_decay=0.1).build(same)
    groups = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [[(6, 4)], [], [(7, 4)], [(7, 4), (5, 4), (6,), (4,)]]
    set_learning_rate(optimizer, 0.02)
    set_learning_rate(adam, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [0.02, 0.02, 0.01, 0.01]
    for each, its in ((parameters, optimizer), (same, adam)):
        set_gradients(each, seed=3)
        apply_update(its, torch.tensor(2.0), torch.tensor(False))
    equal = {name for name in same if torch.equal(parameters[name][0], same[name][0])}
    assert equal == same.keys() - {"mlp.up.weight"}


@pytest.mark.parametrize(
    ("model", "counts"),
    [
        (Gpt2Config(seq_len=8, hidden_dim=12, num_layers=1, num_heads=3), [1, 1, 1]),
        (
            LlamaConfig(
                seq_len=8, hidden_dim=16, intermediate_dim=20, num_layers=1, num_heads=4,
                num_kv_heads=2,
            ),
            [2, 1, 1],
        ),
    ],
)  # fmt: skip
def test_queries_keys_and_values_are_matrices_of_their_own(model, counts):
    """As rows of the products that attention takes apart: each has orthogonal rows by itself."""
    built = model.build(11)
    axes, heads = axes_of(built), 3 if counts == [1, 1, 1] else 2
    named = {name: (p, axes[name]) for name, p in built.named_parameters()}
    name = "blocks.0.attention.qkv.weight"
    weight = named[name][0]
    nn.init.zeros_(weight)
    optimizer = MuonConfig(adjust_lr="original", ns_steps=8).build(named)
    for parameter, _ in named.values():
        parameter.grad = torch.randn(parameter.shape)
    set_learning_rate(optimizer, 1.0)
    apply_update(optimizer, None, None)
    per_head = weight.detach().view(heads, sum(counts), -1, weight.shape[1])
    for part in per_head.split(counts, 1):
        values = torch.linalg.svdvals(part.flatten(0, 2))
        assert values.min() > 0.6 and values.max() < 1.3
    whole = torch.linalg.svdvals(weight.detach())
    assert whole.max() > 1.3, "not orthogonal as a whole"


def train(config: MuonConfig, steps: range, parameters=None, optimizer=None):
    parameters = parameters or make_parameters()
    optimizer = optimizer or config.build(parameters)
    for step in steps:
        set_gradients(parameters, seed=step)
        set_learning_rate(optimizer, 0.02)
        norm = gradient_norm(p.grad for p, _ in parameters.values())
        apply_update(optimizer, clip_scale(norm, 0.5), torch.tensor(False))
    return parameters, optimizer


def named_tensors(parameters, optimizer) -> dict[str, torch.Tensor]:
    weights = {name: parameter for name, (parameter, _) in parameters.items()}
    return optimizer_tensors(optimizer, weights) | {n: p.detach() for n, p in weights.items()}


@pytest.mark.parametrize("fused", [True, False])
def test_a_masked_update_changes_nothing(fused):
    parameters, optimizer = train(MuonConfig(weight_decay=0.1), range(3))
    for group in optimizer.param_groups:
        group["fused"] = fused
    before = {name: tensor.clone() for name, tensor in named_tensors(parameters, optimizer).items()}
    assert "mlp.up.weight.momentum_buffer" in before and "norm.weight.exp_avg" in before
    for bad in (math.nan, math.inf, 1.0):
        set_gradients(parameters, seed=9, scale=bad)
        apply_update(optimizer, torch.tensor(bad), torch.tensor(True))
        after = named_tensors(parameters, optimizer)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    set_gradients(parameters, seed=9)
    apply_update(optimizer, None, None)
    assert not torch.equal(parameters["mlp.up.weight"][0], before["mlp.up.weight"])


def test_clipping_divides_the_gradients():
    """The direction does not depend on their scale, but the momentum does."""
    (first, clipped), (second, scaled) = (train(MuonConfig(), range(1)) for _ in range(2))
    set_gradients(first, seed=5)
    set_gradients(second, seed=5, scale=0.125)
    apply_update(clipped, torch.tensor(8.0), torch.tensor(False))
    apply_update(scaled, None, None)
    one, other = named_tensors(first, clipped), named_tensors(second, scaled)
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_resuming_is_exact():
    config = MuonConfig(weight_decay=0.1)
    whole, optimizer = train(config, range(6))
    parameters, first = train(config, range(3))
    saved = {name: t.clone() for name, t in named_tensors(parameters, first).items()}
    fresh = make_parameters()
    resumed = config.build(fresh)
    for name, tensor in named_tensors(fresh, resumed).items():
        tensor.copy_(saved[name])
    train(config, range(3, 6), fresh, resumed)
    expected, found = named_tensors(whole, optimizer), named_tensors(fresh, resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_many_matrices_are_taken_in_portions(monkeypatch):
    weights = {f"w{i}": (random_matrix(6, 4, seed=i), MATRIX) for i in range(5)}
    found = []
    for limit in (1, 60, 10**6):
        monkeypatch.setattr("ostro.optim.muon._MAX_STACKED", limit)
        parameters, optimizer = build(MuonConfig(), **weights)
        for index, parameter in enumerate(parameters.values()):
            parameter.grad = random_matrix(6, 4, seed=10 + index)
        set_learning_rate(optimizer, 0.1)
        apply_update(optimizer, None, None)
        found.append(torch.stack([p.detach() for p in parameters.values()]))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("momentum", 1.0),
        ("ns_steps", 0),
        ("adam_lr_ratio", -1.0),
        ("beta2", 1.0),
        ("warmup", -1),
    ],
)
def test_bad_settings_are_named(setting, value):
    problems = list(MuonConfig(**{setting: value}).problems())
    assert [problem.setting for problem in problems] == [setting]
