"""Bit for bit the same on 1, 2 and 4 ranks, in any micro-batches, for copies and FSDP."""

from typing import Any

import pytest
import torch
from group import ALONE, BATCH_SIZE, MODELS, OPTIMIZER, spawned, train, trainer_config
from torch.distributed.tensor import DTensor

from ostro.core.errors import ConfigError
from ostro.core.units import Precision
from ostro.distributed import World
from ostro.optim import MuonConfig
from ostro.trainer import TrainerConfig, init_mesh
from ostro.trainer.backends.deterministic import PairwiseSum, pairwise_sum

NUM_STEPS = 3
CASES: dict[str, dict[str, Any]] = {
    "copies": {"fsdp_axis": None},
    "fsdp": {},
    "fsdp in bfloat16": {"mp": Precision(compute="bfloat16")},
    "copies with muon": {"fsdp_axis": None},
    "fsdp with muon": {},
}


def run_all(world: World, num_micro_batches: int) -> dict[str, tuple[dict, dict]]:
    """Figures, and weights and moments in full, of every case and model."""
    found = {}
    for case, settings in CASES.items():
        size = BATCH_SIZE // world.num_ranks // num_micro_batches
        trainer = trainer_config(size, deterministic_reduction=True, **settings)
        placed, mesh = init_mesh(trainer, world)
        optimizer = MuonConfig() if case.endswith("muon") else OPTIMIZER
        for name in ("gpt2", "llama"):
            figures, engine = train(MODELS[name], trainer, placed, NUM_STEPS, mesh, optimizer)
            groups = engine.state.tensors()
            tensors = groups["model"] | groups["optimizer"]
            whole = {
                key: t.full_tensor() if isinstance(t, DTensor) else t for key, t in tensors.items()
            }
            found[f"{name}, {case}"] = figures, whole
    return found


@pytest.mark.dist
def test_losses_and_weights_are_bit_equal():
    threads = torch.get_num_threads()
    try:
        alone = run_all(ALONE, 1)
        in_parts = run_all(ALONE, 4)
    finally:
        torch.set_num_threads(threads)
    for other in (in_parts, spawned(run_all, 2, 2), spawned(run_all, 4, 1)):
        assert other.keys() == alone.keys()
        for case, (figures, tensors) in alone.items():
            assert other[case][0] == figures, case
            for name, tensor in tensors.items():
                assert torch.equal(other[case][1][name], tensor), (case, name)
    losses = alone["gpt2, fsdp"][0]["train/loss"]
    assert losses == alone["gpt2, copies"][0]["train/loss"]
    with_muon = alone["gpt2, fsdp with muon"][0]["train/loss"]
    assert with_muon == alone["gpt2, copies with muon"][0]["train/loss"] != losses
    assert losses != alone["gpt2, fsdp in bfloat16"][0]["train/loss"]
    usual = train(MODELS["gpt2"], trainer_config(2), ALONE, NUM_STEPS)[0]["train/loss"]
    assert losses == pytest.approx(usual, rel=1e-5) and losses != usual


def test_whole_branches_do_not_change_the_sum():
    leaves = [torch.randn(5) * 10**i for i in range(6)] * 2
    total = pairwise_sum(leaf.clone() for leaf in leaves)
    by_branch = PairwiseSum()
    for start in range(0, 12, 4):
        by_branch.add([pairwise_sum(leaf.clone() for leaf in leaves[start : start + 4])])
    assert torch.equal(by_branch.total()[0], total)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"model_axis_size": 2}, "data axis only"),
        ({"deepspeed": {}}, "its own order"),
    ],
)
def test_where_it_does_not_hold(settings, said):
    config = TrainerConfig(deterministic_reduction=True, **settings)
    assert any(said in problem.rule for problem in config.problems())


def test_three_devices_have_no_whole_branches():
    trainer = TrainerConfig(deterministic_reduction=True, train_batch_size=6)
    with pytest.raises(ConfigError, match="power of two"):
        init_mesh(trainer, World(torch.device("cpu"), 0, 3))
