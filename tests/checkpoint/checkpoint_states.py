"""States of a few bytes for the tests of checkpoints."""

import torch

from ostro.checkpoint import State


def on_step(checkpointer, step, make_state, **fields):
    """Save after update `step` if that is due, as a run does."""
    due = checkpointer.due(step, **fields)
    if due is None:
        return None
    checkpointer.save(step, due, make_state)
    return checkpointer.wait()


def small_state(number: int) -> State:
    """A state whose every part is recognisable by `number`."""
    return State(
        tensors={
            "model": {
                "weight": torch.full((3, 2), float(number)),
                "half": torch.full((5,), number, dtype=torch.bfloat16),
            },
            "optimizer": {"weight.exp_avg": torch.full((3, 2), number / 2)},
            "state": {"rng": torch.tensor([number % 256, 1, 2], dtype=torch.uint8)},
        },
        values={"step": number, "loss": float(number)},
        texts={"config.yaml": f"seed: {number}\n"},
    )
