"""Four processes that save and load the state of one small model in every mapping.

    python sharded_ranks.py FOLDER [URL]      a folder of this machine, and one of an object store

Prints one line for each thing that held.
"""

import errno
import logging
import os
import re
import sys
import time
from functools import partial

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from ostro.checkpoint import (
    CheckpointerConfig,
    State,
    find_latest,
    load,
    store,
    whole,
    write,
)
from ostro.core.errors import CheckpointError
from ostro.distributed import World
from ostro.io import filesystem
from ostro.runtime.phase import listening
from ostro.trainer import TrainState

NUM_RANKS = 4


class Model(nn.Module):
    """Ten rows over four ranks are 3, 3, 3 and 1; three rows leave one rank without."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 10)
        self.norm = nn.LayerNorm(10)
        self.down = nn.Linear(10, 3, bias=False)
        self.even = nn.Linear(8, 8, bias=False)


class Ranks:
    """The meshes of this process; making them is a collective of all four."""

    def __init__(self) -> None:
        self.rank = dist.get_rank()
        self.one = DeviceMesh("cpu", [0])
        self.two = DeviceMesh("cpu", [0, 1])
        self.four = init_device_mesh("cpu", (4,))
        self.square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "model"))
        groups = {n: dist.new_group(list(range(n)), backend="gloo") for n in (2, 4)}
        self.mappings = {
            "plain": (1, None, lambda model: None),
            "replicated": (4, groups[4], lambda model: None),
            "fsdp1": (1, None, lambda model: fully_shard(model, mesh=self.one)),
            "fsdp2": (2, groups[2], lambda model: fully_shard(model, mesh=self.two)),
            "fsdp4": (4, groups[4], lambda model: fully_shard(model, mesh=self.four)),
            "hsdp": (4, groups[4], lambda model: fully_shard(model, mesh=self.square)),
            "tensor": (4, groups[4], partial(split, mesh=self.four)),
            "fsdp x tensor": (4, groups[4], self._both),
        }

    def _both(self, model: nn.Module) -> None:
        split(model, self.square["model"])
        fully_shard(model, mesh=self.square["data"])

    def state(self, mapping: str) -> TrainState | None:
        """A state after one update; None where this rank is not of the mapping."""
        num_ranks, _, place = self.mappings[mapping]
        if self.rank >= num_ranks:
            return None
        torch.manual_seed(0)
        model = Model()
        place(model)
        state = state_of(model)
        update(state)
        return state


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Columns of one layer, rows of two, and the norm on every rank."""
    dims = {"up.weight": 0, "up.bias": 0, "down.weight": 1, "even.weight": 1}
    for name, parameter in list(model.named_parameters()):
        owner = model.get_submodule(name.rpartition(".")[0])
        placement = Shard(dims[name]) if name in dims else Replicate()
        sharded = distribute_tensor(parameter.detach(), mesh, [placement])
        setattr(owner, name.rpartition(".")[2], nn.Parameter(sharded))


def state_of(model: nn.Module) -> TrainState:
    """As a run has it: the optimizer works on the parts that this rank holds."""
    parameters = {
        name: nn.Parameter(p.to_local().detach()) if isinstance(p, DTensor) else p
        for name, p in model.named_parameters()
    }
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    return TrainState(model, parameters, optimizer, seed=0, device=torch.device("cpu"))


def update(state: TrainState) -> None:
    for parameter in state.parameters.values():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    state.step += 1


def say(what: str) -> None:
    """Once it holds on all ranks."""
    dist.barrier()
    if dist.get_rank() == 0:
        print(what, flush=True)


def full(tensors):
    """Whole tensors of groups; all ranks of their meshes take part."""
    return {
        group: {
            name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()
            for name, t in named.items()
        }
        for group, named in tensors.items()
        if group != "state"
    }


def differences(found, expected) -> list[str]:
    assert found.keys() == expected.keys() == {"model", "optimizer"}
    assert all(found[group].keys() == expected[group].keys() for group in expected)
    return [
        name
        for group in expected
        for name in expected[group]
        if not torch.equal(found[group][name], expected[group][name])
    ]


def reference() -> TrainState:
    """What all mappings hold: five updates with random gradients, so that no two values agree."""
    torch.manual_seed(0)
    model = Model()
    state = state_of(model)
    for seed in range(5):
        torch.manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        state.optimizer.step()
    state.step = 5
    return state


class InMemory:
    """A checkpoint that was never on a disk."""

    def __init__(self, state: TrainState) -> None:
        self.groups, self.values = state.tensors(), state.values()

    def stored(self, group):
        return whole(self.groups[group])

    def tensors(self, group):
        return self.groups[group]


def every_mapping_loads_every_other(ranks: Ranks, folder: str) -> None:
    known = reference()
    expected = full(known.tensors())
    for saver, (_, group, _) in ranks.mappings.items():
        state = ranks.state(saver)
        base = f"{folder}/{saver.replace(' ', '-')}"
        if state is not None:
            state.load(InMemory(known))
            assert not differences(full(state.tensors()), expected)
            write(base, State(state.tensors(), state.values()), step=4, is_temporary=False,
                  group=group)  # fmt: skip
        dist.barrier()
        saved = load(f"{base}/step-4")
        assert not differences({g: saved.tensors(g) for g in expected}, expected)
        for loader in ranks.mappings:
            state = ranks.state(loader)
            if state is not None:
                saved = load(f"{base}/step-4")
                state.load(saved)
                found = differences(full(state.tensors()), expected)
                assert not found and state.step == 5, f"{saver} to {loader}: {found}"
                step = next(iter(state.optimizer.state.values()))["step"]
                assert step == 5
            say(f"{saver} -> {loader}")


def what_fails_on_one_rank_fails_on_all(ranks: Ranks, folder: str) -> None:
    state, (_, group, _) = ranks.state("fsdp4"), ranks.mappings["fsdp4"]
    save = partial(write, folder, is_temporary=False, group=group)
    save(State(state.tensors(), state.values()), step=4)

    def full_disk(url, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    faults = [
        (2, store, "_write_file", full_disk, "rank 2: the disk is full"),
        (0, store, "_write_file", full_disk, "rank 0: the disk is full"),
        (1, filesystem, "is_folder", lambda url: False, "rank 1: cannot be .* share one disk"),
        (0, filesystem, "move", lambda *_: 1 / 0, "rank 0: cannot be written: division by zero"),
    ]  # fmt: skip
    for rank, module, name, fault, message in faults:
        for step in (4, 7):
            real = getattr(module, name)
            if ranks.rank == rank:
                setattr(module, name, fault)
            fails(message, save, State(state.tensors(), {"step": 99}), step=step)
            setattr(module, name, real)
            assert filesystem.names(folder) == ["step-4"], filesystem.names(folder)
            assert load(f"{folder}/step-4").values["step"] == 1
            dist.barrier()
    say("failed")


def fails(message: str, act, *args, **kwargs) -> None:
    try:
        act(*args, **kwargs)
    except CheckpointError as error:
        assert re.search(message, str(error)), error
    else:
        raise AssertionError("no error")
    dist.barrier()


def a_file_that_cannot_be_written_fails_on_all(ranks: Ranks, folder: str) -> None:
    if ranks.rank == 0:
        open(folder, "w").close()
    dist.barrier()
    state = ranks.state("fsdp4")
    checkpointer = CheckpointerConfig(f"{folder}/.", format="file").build("me", "me")
    checkpointer.join()
    due = checkpointer.due(5, interrupted=True)
    checkpointer.save(5, due, lambda: State(state.tensors(), state.values()))
    fails("step_5.pt - cannot be written", checkpointer.wait)
    say("failed to write a file")


def training_goes_on_while_it_is_saved(ranks: Ranks, folder: str, mapping: str, form: str) -> None:
    config = CheckpointerConfig(folder, format=form)
    world = World(torch.device("cpu"), ranks.rank, NUM_RANKS)
    state = ranks.state(mapping)
    expected = full(state.tensors())
    checkpointer = config.build("me", "me")
    checkpointer.join()
    for number, step in enumerate((5, 6)):
        due = checkpointer.due(step, interrupted=True)
        with listening(lambda phase: phase == "stage" and time.sleep(0.2)):
            checkpointer.save(step, due, lambda: State(state.tensors(), state.values()))
            checkpointer.before_update()
        update(state)  # while it is written
        report = checkpointer.wait()
        assert report.step == step
        dist.barrier()
        saved = find_latest(checkpointer.folder, world)
        found = {group: dict(saved.tensors(group)) for group in expected}
        assert not differences(found, expected), number
        expected = full(state.tensors())
        dist.barrier()
    again = ranks.state("fsdp2")
    if again is not None:
        again.load(saved)
        whole_again = full(again.tensors())
        assert not differences(whole_again, {g: saved.tensors(g) for g in whole_again})
        assert again.step == 2
    if form == "folder":  # what was superseded is gone
        assert filesystem.names(checkpointer.folder) == ["step-6"]
    else:
        assert filesystem.names(checkpointer.folder) == ["latest_checkpoint.pt", "step_6.pt"]
    say(f"went on {mapping} {form}")


def damage_that_one_rank_sees_makes_all_take_an_older_one(ranks: Ranks, folder: str) -> None:
    world = World(torch.device("cpu"), ranks.rank, NUM_RANKS)
    state, (_, group, _) = ranks.state("fsdp4"), ranks.mappings["fsdp4"]
    for step in (4, 7):
        values = {"step": step}
        write(folder, State(state.tensors(), values), step=step, is_temporary=False, group=group)
    assert find_latest(folder, world).values["step"] == 7
    dist.barrier()
    if ranks.rank == 0:
        with open(f"{folder}/step-7/optimizer-00002-of-00004.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"!")
    dist.barrier()
    assert find_latest(folder, world).values["step"] == 4
    say("damage")


def work(rank: int, folder: str, url: str) -> None:
    rendezvous = dist.FileStore(f"{folder}/rendezvous", NUM_RANKS)
    dist.init_process_group("gloo", store=rendezvous, rank=rank, world_size=NUM_RANKS)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # what is slow in it
    ranks = Ranks()
    every_mapping_loads_every_other(ranks, f"{folder}/mappings")
    what_fails_on_one_rank_fails_on_all(ranks, f"{folder}/full")
    a_file_that_cannot_be_written_fails_on_all(ranks, f"{folder}/in-the-way")
    damage_that_one_rank_sees_makes_all_take_an_older_one(ranks, f"{folder}/damage")
    training_goes_on_while_it_is_saved(ranks, f"{folder}/local", "fsdp4", "folder")
    training_goes_on_while_it_is_saved(ranks, f"{folder}/file", "fsdp4", "file")
    if url:
        training_goes_on_while_it_is_saved(ranks, url, "fsdp x tensor", "folder")
    dist.destroy_process_group()


if __name__ == "__main__":
    words = [*sys.argv[1:], ""]
    # Nothing but imports was done, and no thread started: forks spare three of those.
    mp.start_processes(work, words[:2], NUM_RANKS, start_method="fork")
