"""Copies weights between transformers' models and ours, for parity tests."""

import torch

from ostro.models.hf import from_hf


def randomize(model, seed=0, deviation=0.2):
    """Fill every parameter, biases and norms too; gains are centred on one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0.0, deviation, generator=generator)
            if name.endswith("weight") and parameter.ndim == 1:
                parameter.add_(1.0)


def values(theirs, config, read):
    """Our parameter names -> values taken from transformers' model by `read(parameter)`."""
    return from_hf(config, {name: read(p) for name, p in theirs.named_parameters()})


def load(ours, values):
    """Copy values into our model; every parameter must be there."""
    parameters = dict(ours.named_parameters())
    assert parameters.keys() == values.keys()
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(value)


def assert_close(ours, theirs, tolerance, what):
    """The largest absolute difference is at most the tolerance."""
    difference = (ours - theirs).abs().max().item()
    assert difference <= tolerance, f"{what}: {difference:.2e}"
