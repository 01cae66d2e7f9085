"""Carry out a sharding plan with torch: split layers, compile blocks, then FSDP2.

The order matters: tensor parallelism makes DTensors of single parameters and tells layers about
their group; FSDP2 then shards what is left on each device and gathers it block by block. Parameters
are DTensors afterwards, so that checkpoints know where everything lies; layers compute on plain
tensors and communicate by themselves (`nn.collectives`).
"""

import os
from collections.abc import Mapping
from itertools import pairwise

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from ostro.core.axes import DATA, MODEL, VOCAB, AxisMapping
from ostro.models.lm_model import LmModel
from ostro.nn import Embedding, Linear, axes_of
from ostro.nn.attention import CausalAttention
from ostro.parallel.mesh import Mesh
from ostro.parallel.plan import ParameterPlan, plan_sharding
from ostro.runtime.compile_cache import code_folder


def shard(
    model: LmModel, mapping: AxisMapping, mesh: Mesh, compute_dtype: torch.dtype, *, compiles: bool
) -> None:
    """Lay out `model`, which is on the meta device, over the mesh. Values come later."""
    axes = axes_of(model)
    plans = plan_sharding(
        {name: (tuple(p.shape), axes[name]) for name, p in model.named_parameters()},
        mapping,
        mesh.sizes,
    )
    model.context = mesh.context
    for module in model.modules():
        if isinstance(module, CausalAttention):
            module.context = mesh.context
    if mesh.model is not None:
        _split_layers(model, plans, mapping, mesh)
    if compiles:
        compile_blocks(model)
    if mesh.is_split:
        _fully_shard(model, plans, mesh, compute_dtype)


def compile_blocks(model: LmModel) -> None:
    """Compile each block by itself; the first one's code serves all, and later runs."""
    if not os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(code_folder())
    for block in model.blocks:
        block.compile()


def _split_layers(
    model: LmModel, plans: Mapping[str, ParameterPlan], mapping: AxisMapping, mesh: Mesh
) -> None:
    for prefix, module in model.named_modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            dim = plans[f"{prefix}.{name}"].dims.get(MODEL)
            if dim is not None:
                whole = parameter.detach()
                part = distribute_tensor(whole, mesh.model_mesh, [Shard(dim)], src_data_rank=None)
                setattr(module, name, nn.Parameter(part))
        if not isinstance(module, Linear | Embedding):
            continue
        axes = module.parameter_axes["weight"]
        if mapping.is_split(axes.ins[0], MODEL):
            module.split_in = mesh.model
        if isinstance(module, Linear) and mapping.is_split(axes.outs[0], MODEL):
            module.split_out = mesh.model
    if mapping.is_split(VOCAB, MODEL):
        model.vocab_group = mesh.model


def _fully_shard(
    model: LmModel, plans: Mapping[str, ParameterPlan], mesh: Mesh, compute_dtype: torch.dtype
) -> None:
    over = mesh.fsdp_mesh
    if over is None:
        return
    # One unit for each block, gathered in the dtype it computes in; embedding and head stay with
    # the root, as one parameter may be both.
    dims = {id(p): plans[name].dims.get(DATA, 0) for name, p in model.named_parameters()}
    cast = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in model.blocks:
        fully_shard(
            block, mesh=over, mp_policy=cast, shard_placement_fn=lambda p: Shard(dims[id(p)])
        )
    fully_shard(model, mesh=over, shard_placement_fn=lambda p: Shard(dims[id(p)]))
    # The next block is asked for before this one computes, however far Python lags behind a GPU;
    # in the backward pass FSDP does so by itself.
    for block, after in pairwise(model.blocks):
        block.set_modules_to_forward_prefetch([after])
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # The loss is a share of the batch's mean: gradients are summed, never averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
