"""Optimizers of a user's own: what they make at their first step is kept, or they are refused."""

import pytest
import safetensors.torch
import torch
from tiny_run import ostro, write_config

PARTS = """
from dataclasses import dataclass

import torch
from torch import nn

from ostro.models import Gpt2Config
from ostro.models.lm_model import LmConfig
from ostro.optim import OptimizerConfig


class Counts(torch.optim.Optimizer):
    def __init__(self, groups, lr, keep):
        super().__init__(groups, {"lr": lr})
        self.keep = keep
        self.steps = 0

    @torch.no_grad()
    def step(self, closure=None):
        if self.keep == "beside":
            self.steps += 1
        for group in self.param_groups:
            if self.keep == "group":
                group["k"] = group.get("k", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                state.setdefault("step", 0)
                state.setdefault("mean", torch.zeros_like(p))
                if self.keep == "list":
                    state.setdefault("history", []).append(1)
                state["step"] += 1
                state["mean"].lerp_(p.grad, 1 / state["step"])
                p.sub_(group["lr"] * state["mean"])


MAKERS = {
    "momentum": lambda g, lr: torch.optim.SGD(g, lr, momentum=0.9),
    "nesterov": lambda g, lr: torch.optim.SGD(g, lr, momentum=0.9, nesterov=True),
    "plain": lambda g, lr: torch.optim.SGD(g, lr),
    "adagrad": lambda g, lr: torch.optim.Adagrad(g, lr),
    "rmsprop": lambda g, lr: torch.optim.RMSprop(g, lr, momentum=0.9),
    "adamw": lambda g, lr: torch.optim.AdamW(g, lr),
    "nadam": lambda g, lr: torch.optim.NAdam(g, lr),
    "adamax": lambda g, lr: torch.optim.Adamax(g, lr),
    "lbfgs": lambda g, lr: torch.optim.LBFGS([p for group in g for p in group["params"]], lr),
    "numbers": lambda g, lr: Counts(g, lr, ""),
    **{keep: lambda g, lr, keep=keep: Counts(g, lr, keep) for keep in ("beside", "group", "list")},
}


@OptimizerConfig.register_subclass("own")
@dataclass(frozen=True)
class OwnConfig(OptimizerConfig):
    kind: str = "momentum"

    def build(self, parameters, split=None):
        own = [p for p, _ in parameters.values()]
        return MAKERS[self.kind]([{"params": own[:3]}, {"params": own[3:]}], self.learning_rate)


@LmConfig.register_subclass("foreign")
@dataclass(frozen=True)
class ForeignConfig(Gpt2Config):
    part: str = "linear"

    def build(self, vocab_size, compute_dtype=torch.float32):
        model = super().build(vocab_size, compute_dtype)
        width = self.hidden_dim
        if self.part == "buffer":
            model.register_buffer("mask", torch.ones(3))
        else:
            kinds = {"linear": lambda: nn.Linear(width, width), "norm": lambda: nn.LayerNorm(width),
                     "embedding": lambda: nn.Embedding(8, width)}
            model.extra = kinds[self.part]()
        return model
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "own_parts.py").write_text(PARTS)
    return tmp_path


def train(folder, kind, num_steps, fails=False, **changes):
    flags = ["--trainer.num_train_steps", str(num_steps), "--optimizer.schedule_steps", "6"]
    settings = {"imports": ["own_parts"], "optimizer": {"type": "own", "kind": kind}} | changes
    settings["trainer"] = {"id": "own", "mp": "f32"}
    done = ostro("train", "--config_path", write_config(folder, **settings), *flags, cwd=folder)
    assert done.returncode == (2 if fails else 0), done.stderr
    assert "Traceback" not in done.stderr
    log = folder / "logs" / "own" / "train.log"
    return done.stderr + (log.read_text() if log.exists() else "")


def tensors(folder):
    found = {}
    for file in (folder / "checkpoints" / "own" / "step-5").glob("*.safetensors"):
        named = safetensors.torch.load_file(file)
        found |= {f"{file.stem}/{name}": tensor for name, tensor in named.items()}
    return found


KINDS = [
    "momentum",
    "nesterov",
    "plain",
    "adagrad",
    "rmsprop",
    "adamw",
    "nadam",
    "adamax",
    "numbers",
]


@pytest.mark.parametrize("kind", KINDS)
def test_state_made_at_the_first_step_is_resumed_bit_for_bit(tmp_path, kind):
    states = []
    for name, lengths in (("whole", [6]), ("halves", [3, 6])):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "own_parts.py").write_text(PARTS)
        for num_steps in lengths:
            said = train(folder, kind, num_steps)
        assert ("resuming from" in said) == (name == "halves")
        states.append(tensors(folder))
    whole, halves = states
    assert whole.keys() == halves.keys()
    assert any(name.startswith("optimizer/") for name in whole) == (kind != "plain")
    assert [name for name in whole if not torch.equal(whole[name], halves[name])] == []
    if kind == "numbers":
        steps = [value for name, value in whole.items() if name.endswith(".step")]
        assert steps and all(step.item() == 6 for step in steps)


@pytest.mark.parametrize(
    ("kind", "why"),
    [("lbfgs", "closure"), ("beside", "keeps steps outside"), ("list", "keeps a list in"),
     ("group", r"param_groups[0]['k']")],
)  # fmt: skip
def test_what_could_not_be_resumed_does_not_start(folder, kind, why):
    said = train(folder, kind, 6, fails=True)
    assert "optimizer.type" in said and "could not be resumed" in said and why in said
    assert not list(folder.rglob("step-*"))


@pytest.mark.parametrize("part", ["linear", "norm", "embedding", "buffer"])
def test_a_module_of_torch_is_told_what_parameters_need(folder, part):
    model = {"type": "foreign", "part": part}
    said = train(folder, "momentum", 6, fails=True, model=model)
    assert "model.type" in said
    if part == "buffer":
        assert "mask is a buffer" in said
    else:
        kind = {"linear": "Linear", "norm": "LayerNorm", "embedding": "Embedding"}[part]
        assert f"parameter extra.weight of a {kind}" in said
        assert "parameter_axes" in said and "parameter_fill" in said and "ostro.nn" in said
