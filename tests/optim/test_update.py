"""AdamW, clipping, decay masks and masked updates."""

import math

import pytest
import torch
from torch import nn

from ostro import kernels
from ostro.core.axes import EMBED, MLP, POSITION, VOCAB, ParameterAxes
from ostro.core.errors import ConfigError
from ostro.optim import (
    AdamConfig,
    LossScaler,
    SkipStepConfig,
    apply_update,
    clip_scale,
    gradient_norm,
    optimizer_tensors,
    set_learning_rate,
)

AXES = {
    "embed.weight": ParameterAxes((EMBED,), (VOCAB,), lookup=True),
    "positions.weight": ParameterAxes((EMBED,), (POSITION,), lookup=True),
    "mlp.up.weight": ParameterAxes((MLP,), (EMBED,)),
    "mlp.up.bias": ParameterAxes((MLP,)),
    "norm.weight": ParameterAxes((EMBED,)),
}
SIZES = {VOCAB: 7, POSITION: 5, EMBED: 4, MLP: 6}


def make_parameters(seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            nn.Parameter(
                torch.randn([SIZES[axis] for axis in axes.names], generator=generator).to(dtype)
            ),
            axes,
        )
        for name, axes in AXES.items()
    }


def set_gradients(parameters, seed: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter, _ in parameters.values():
        grad = torch.randn(parameter.shape, generator=generator) * scale
        parameter.grad = grad.to(parameter.dtype)


def train(config: AdamConfig, num_steps: int, dtype: torch.dtype = torch.float32):
    """Some steps with made-up gradients; the parameters and the optimizer."""
    parameters = make_parameters(dtype=dtype)
    optimizer = config.build(parameters)
    schedule = config.schedule(num_steps)
    for step in range(num_steps):
        set_gradients(parameters, seed=step)
        set_learning_rate(optimizer, schedule(step))
        norm = gradient_norm(p.grad for p, _ in parameters.values())
        apply_update(optimizer, clip_scale(norm, config.max_grad_norm), torch.tensor(False))
    return parameters, optimizer


def reference(config: AdamConfig, num_steps: int) -> dict[str, torch.Tensor]:
    """The same in float64 from the papers: clip, Adam, decoupled decay, learning rate."""
    weights = {name: p.detach().double() for name, (p, _) in make_parameters().items()}
    means = {name: torch.zeros_like(w) for name, w in weights.items()}
    squares = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(num_steps):
        parameters = make_parameters()
        set_gradients(parameters, seed=step)
        grads = {name: p.grad.double() for name, (p, _) in parameters.items()}
        norm = math.sqrt(sum(float((grad**2).sum()) for grad in grads.values()))
        clip = min(1.0, config.max_grad_norm / norm) if config.max_grad_norm else 1.0
        learning_rate = config.schedule(num_steps)(step)
        for name, weight in weights.items():
            grad = grads[name] * clip
            means[name] = config.beta1 * means[name] + (1 - config.beta1) * grad
            squares[name] = config.beta2 * squares[name] + (1 - config.beta2) * grad**2
            mean = means[name] / (1 - config.beta1 ** (step + 1))
            square = squares[name] / (1 - config.beta2 ** (step + 1))
            update = mean / (square.sqrt() + config.epsilon)
            if name == "mlp.up.weight":
                update = update + config.weight_decay * weight
            weights[name] = weight - learning_rate * update
    return weights


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("max_grad_norm", [None, 0.5, 1e9])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 3e-7)])
def test_adamw_against_a_float64_reference(dtype, tolerance, max_grad_norm, enabled):
    kernels.enable(enabled)
    config = AdamConfig(
        learning_rate=0.02,
        weight_decay=0.3,
        warmup=3,
        epsilon=1e-3,  # large enough to tell inside from outside the root
        max_grad_norm=max_grad_norm,
    )
    parameters, _ = train(config, 12, dtype)
    for name, expected in reference(config, 12).items():
        found = parameters[name][0].detach().double()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_same_inputs_same_bits():
    config = AdamConfig(learning_rate=0.02, weight_decay=0.1)
    (first, optimizer), (second, _) = train(config, 5), train(config, 5)
    assert all(torch.equal(first[name][0], second[name][0]) for name in AXES)
    assert optimizer.defaults["fused"] is True


def test_only_matrices_decay_by_default():
    parameters = make_parameters()
    before = {name: parameter.detach().clone() for name, (parameter, _) in parameters.items()}
    optimizer = AdamConfig(weight_decay=0.1).build(parameters)
    for parameter, _ in parameters.values():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.1)
    apply_update(optimizer, None, None)
    for name, (parameter, _) in parameters.items():
        factor = 0.99 if name == "mlp.up.weight" else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


EMBEDDINGS = {"embed.weight", "positions.weight"}


@pytest.mark.parametrize(
    ("fields", "decaying"),
    [
        ({}, {"mlp.up.weight"}),
        ({"default_weight_decay_mask": True}, {"mlp.up.weight"}),
        ({"default_weight_decay_mask": False}, set(AXES)),
        ({"decay_mask": "all_2d"}, {"mlp.up.weight"} | EMBEDDINGS),
        (
            {"weight_decay_modules": ["mlp", "norm"]},
            {"mlp.up.weight", "mlp.up.bias", "norm.weight"},
        ),
        ({"weight_decay_modules": r".*bias"}, {"mlp.up.bias"}),
        ({"weight_decay_modules": r"up\.bias|embed"}, {"embed.weight"}),  # from the start
        (
            {"weight_decay_modules": ["norm"], "default_weight_decay_mask": True},
            {"norm.weight", "mlp.up.weight"},
        ),
        ({"weight_decay_modules": ["norm"], "default_weight_decay_mask": False}, {"norm.weight"}),
    ],
)
def test_decay_mask(fields, decaying):
    parameters = make_parameters()
    optimizer = AdamConfig(weight_decay=0.1, **fields).build(parameters)
    names = {id(parameter): name for name, (parameter, _) in parameters.items()}
    groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
    assert groups == [
        [name for name in AXES if name in decaying],
        [name for name in AXES if name not in decaying],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    set_gradients(parameters, seed=0)
    apply_update(optimizer, None, None)  # an empty group is no trouble


def test_weight_decay_modules_that_fit_nothing_are_refused():
    with pytest.raises(ConfigError, match=r"weight_decay_modules = \['attention'\] - fits no para"):
        AdamConfig(weight_decay_modules=["attention"]).build(make_parameters())
    problems = list(AdamConfig(weight_decay_modules="(").problems())
    assert [problem.setting for problem in problems] == ["weight_decay_modules"]


def test_gradient_norm():
    first, second, third = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    first.grad = torch.tensor([3.0, 0.0])
    second.grad = torch.tensor([0.0, 4.0])
    assert gradient_norm([first.grad, second.grad, third.grad]).item() == 5.0
    assert gradient_norm([third.grad]).item() == 0.0
    half = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    half.grad = torch.full((2,), 1.0, dtype=torch.bfloat16)
    assert gradient_norm([half.grad]).item() == pytest.approx(2**0.5, rel=1e-6), (
        "not rounded to bfloat16"
    )


def test_clipping_is_exactly_max_over_norm():
    parameter = nn.Parameter(torch.zeros(4))
    parameter.grad = torch.ones(4)  # norm 2
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    apply_update(optimizer, clip_scale(gradient_norm([parameter.grad]), 1.0), None)
    assert parameter.tolist() == [-0.5] * 4
    norm = torch.tensor(7.0)
    assert clip_scale(norm, 7.5).item() == 1.0
    assert clip_scale(norm, None).item() == clip_scale(norm, 0.0).item() == 1.0


@pytest.mark.parametrize("num_before", [0, 3])
def test_a_masked_update_changes_no_bit(num_before):
    parameters, optimizer = train(AdamConfig(learning_rate=0.1, weight_decay=0.1), num_before or 1)
    if not num_before:
        parameters = make_parameters()
        optimizer = AdamConfig(learning_rate=0.1, weight_decay=0.1).build(parameters)
    weights = {name: parameter for name, (parameter, _) in parameters.items()}
    before = {name: tensor.detach().clone() for name, tensor in weights.items()}
    state = {n: t.clone() for n, t in optimizer_tensors(optimizer, weights).items()}
    assert len(state) == 3 * len(AXES)
    for bad in (math.nan, math.inf):
        set_gradients(parameters, seed=9, scale=bad)
        norm = gradient_norm(w.grad for w in weights.values())
        apply_update(optimizer, clip_scale(norm, 1.0), ~norm.isfinite())
    assert all(torch.equal(weights[name], before[name]) for name in AXES)
    after = optimizer_tensors(optimizer, weights)
    assert all(torch.equal(after[name], state[name]) for name in state)
    assert state["norm.weight.step"].item() == num_before

    set_gradients(parameters, seed=9)
    apply_update(optimizer, None, None)
    assert not torch.equal(weights["norm.weight"], before["norm.weight"]), (
        "the mask was for one step"
    )


def test_masking_without_a_fused_kernel():
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.full((2,), math.nan)
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    apply_update(optimizer, torch.tensor(1.0), torch.tensor(True))
    assert parameter.tolist() == [1.0, 1.0]


def test_optimizer_tensors_carry_the_state_over():
    config = AdamConfig(learning_rate=0.05)
    parameters, optimizer = train(config, 4)
    copies = {
        name: (nn.Parameter(parameter.detach().clone()), axes)
        for name, (parameter, axes) in parameters.items()
    }
    resumed = config.build(copies)
    saved = optimizer_tensors(optimizer, {name: p for name, (p, _) in parameters.items()})
    for name, tensor in optimizer_tensors(resumed, {n: p for n, (p, _) in copies.items()}).items():
        tensor.copy_(saved[name])
    for these, its_optimizer in ((parameters, optimizer), (copies, resumed)):
        set_gradients(these, seed=11)
        set_learning_rate(its_optimizer, 0.03)
        apply_update(its_optimizer, None, None)
    assert all(torch.equal(parameters[name][0], copies[name][0]) for name in AXES)


def test_loss_scaler_doubles_halves_and_remembers():
    scaler = LossScaler("cpu", init_scale=8.0, growth_interval=3)
    good, overflow = torch.tensor(False), torch.tensor(True)
    scales = []
    for event in (good, good, good, good, good, overflow, good, good, good):
        scaler.update(event)
        scales.append(scaler.scale.item())
    assert scales == [8, 8, 16, 16, 16, 8, 8, 8, 16]
    scaler.update(good)

    copy = LossScaler("cpu", growth_interval=3)
    assert copy.scale.item() == 2.0**16
    copy.load_state_dict(scaler.state_dict())
    for _ in range(2):
        copy.update(good)
    assert copy.scale.item() == 32, "the count of good steps goes on"
    for _ in range(20):
        copy.update(overflow)
    assert copy.scale.item() == 1.0
    assert copy.at_minimum.item()
    assert not scaler.at_minimum.item()


def test_skip_setting_in_its_forms():
    assert AdamConfig().skip_step is None
    assert AdamConfig(skip_bad_steps=0).skip_step is None
    assert AdamConfig(skip_bad_steps=True).skip_step == SkipStepConfig(128, 6.0)
    assert AdamConfig(skip_bad_steps=64).skip_step == SkipStepConfig(64, 6.0)
    own = SkipStepConfig(10, 3.0)
    assert AdamConfig(skip_bad_steps=own).skip_step is own
    assert [p.setting for p in AdamConfig(skip_bad_steps=1).problems()] == ["skip_bad_steps"]
    rules = [p.setting for p in SkipStepConfig(1, 0.0).problems()]
    assert rules == ["rolling_interval_length", "sigma_factor"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("beta1", 1.0),
        ("beta2", -0.1),
        ("epsilon", -1e-8),
        ("max_grad_norm", -1.0),
        ("weight_decay", math.inf),
    ],
)
def test_bad_adam_settings_are_named(setting, value):
    problems = list(AdamConfig(**{setting: value}).problems())
    assert [problem.setting for problem in problems] == [setting]
