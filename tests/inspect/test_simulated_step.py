"""A played step calls the collectives of a real one, and shows where memory falls."""

import pytest
import torch
from group import MODELS, OPTIMIZER, VOCAB, batch_of, spawned, trainer_config

from ostro.cli.main import run_command
from ostro.core.errors import ConfigError
from ostro.data.sources.source import StdlibSource
from ostro.data.text import LMDatasetConfig
from ostro.distributed import World
from ostro.inspect.simulated_step import CollectiveCounter, simulate_step
from ostro.lm_config import TrainLmConfig
from ostro.models.gpt2 import Gpt2Config
from ostro.trainer import TrainerConfig, build_state, choose_engine, init_mesh

SPLIT = {"tensor_parallel_axes": ["mlp", "heads", "vocab"], "model_axis_size": 2}
LAYOUTS = {
    "fsdp": {},
    "fsdp x model": SPLIT,
    "fsdp x context": {"context_axis_size": 2},
    "replica x fsdp": {"replica_axis_size": 2},
}


def config(model, trainer) -> TrainLmConfig:
    data = LMDatasetConfig(source=StdlibSource())
    return TrainLmConfig(data, trainer, model, optimizer=OPTIMIZER, vocab_size=VOCAB)


def real_steps(world: World) -> dict[str, tuple[dict, dict]]:
    found = {}
    for layout, settings in LAYOUTS.items():
        for name in ("gpt2", "llama"):
            trainer = trainer_config(1, **settings)
            placed, mesh = init_mesh(trainer, world)
            state = build_state(MODELS[name], OPTIMIZER, trainer, VOCAB, world.device, mesh)
            plan = trainer.batch_plan(world.num_ranks)
            engine = choose_engine(trainer, OPTIMIZER, plan, placed, mesh)(state)
            rows = plan.num_micro_batches(0)
            batch = batch_of(0)
            with CollectiveCounter() as counter:
                loss = torch.zeros(())
                for row in range(rows):
                    micro = batch.rows(row, row + 1)
                    loss += engine.backward(micro, 1, is_last=row == rows - 1)
                engine.update(loss, 0.0, OPTIMIZER.max_grad_norm)
            found[layout, name] = dict(counter.calls), dict(counter.bytes)
    return found


@pytest.mark.dist
def test_collectives_are_those_of_four_real_processes():
    for (layout, name), (calls, num_bytes) in spawned(real_steps, 4).items():
        played = simulate_step(config(MODELS[name], trainer_config(1, **LAYOUTS[layout])), 4)
        assert played.calls == calls, (layout, name)
        assert played.bytes == num_bytes, (layout, name)
        assert {"all-gather", "reduce-scatter", "all-reduce"} <= calls.keys()


class Order(CollectiveCounter):
    """G for a gather, F and B for a block's attention forward and backward."""

    found = ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name
        if "allgather" in name:
            Order.found += "G"
        elif "scaled_dot_product" in name:
            Order.found += "B" if "backward" in name else "F"
        return super().__torch_dispatch__(func, types, args, kwargs)


def test_weights_are_gathered_while_the_block_before_computes(monkeypatch):
    monkeypatch.setattr("ostro.inspect.simulated_step.CollectiveCounter", Order)
    monkeypatch.setattr(Order, "found", "")
    model = Gpt2Config(seq_len=16, num_layers=4, hidden_dim=16, num_heads=2,
                       gradient_checkpointing=False)  # fmt: skip
    simulate_step(config(model, trainer_config(1)), 4)
    # The root's and two blocks', then always one block ahead, in both directions.
    assert Order.found == ("GGGFGFGFF" + "GGBGBGBB") * 3, "three micro-batches"


def test_memory_falls_with_context_parallel_devices():
    model = Gpt2Config(seq_len=1024, num_layers=4, hidden_dim=128, num_heads=4,
                       gradient_checkpointing=False)  # fmt: skip
    held = {}
    for devices in (1, 2, 4):
        settings = {"train_batch_size": 1, "per_device_parallelism": 1}
        trainer = TrainerConfig(context_axis_size=devices, **settings)
        held[devices] = simulate_step(config(model, trainer), devices)
    # When Python frees what refers to itself is left to chance.
    assert held[4].working < 0.6 * held[1].working and held[2].working < 0.85 * held[1].working
    assert held[4].parameters * 4 == held[1].parameters and not held[1].calls


def test_step_as_typed(capsys):
    words = ["plan", "step", "--config_path", "config/llama2_7b.yaml", "--devices", "64"]
    words += [
        "--model.num_layers",
        "2",
        "--vocab_size",
        "32000",
        "--trainer.train_batch_size",
        "64",
    ]
    assert run_command(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("weights  ") and "reduce-scatter        3 " in out


def test_copies_have_nothing_to_rehearse():
    with pytest.raises(ConfigError, match="nothing is split"):
        simulate_step(config(MODELS["gpt2"], trainer_config(fsdp_axis=None)), 4)
