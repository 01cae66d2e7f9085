"""What runs on a GPU, traced without one: fake tensors have shapes and devices, but no values.

Nothing here says how fast it is there, or that it computes the right numbers. A build of torch for
CPUs can neither differentiate nor index fake tensors of a GPU; the meta device shows that side.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ostro.core.axes import EMBED, MLP, ParameterAxes
from ostro.models import Gpt2Config, LlamaConfig
from ostro.optim import AdamConfig, apply_update, clip_scale, gradient_norm

SIZES = {"seq_len": 32, "hidden_dim": 64, "num_layers": 2, "gradient_checkpointing": False}
MODELS = {
    "gpt2": Gpt2Config(num_heads=2, **SIZES),
    "llama": LlamaConfig(num_heads=2, num_kv_heads=1, intermediate_dim=128, **SIZES),
}


class Operators(TorchDispatchMode):
    """The names of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))

    def assert_never_waits(self):
        assert self.names
        waiting = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero"}
        assert not waiting & {*self.names}


class Attention(TorchFunctionMode):
    """How torch's attention is called: it chooses the kernel by that."""

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls.append((args, kwargs))
        return func(*args, **(kwargs or {}))

    def assert_flash_can_do_it(self, num_layers: int):
        assert len(self.calls) == num_layers
        for args, kwargs in self.calls:  # no mask, and half the bytes
            assert kwargs["is_causal"] and kwargs["attn_mask"] is None and not kwargs["dropout_p"]
            assert {x.dtype for x in args} == {torch.bfloat16}


def build(name: str):
    with torch.device("meta"):
        return MODELS[name].build(128, torch.bfloat16)


def test_a_loss_on_a_gpu():
    model = build("gpt2")
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        for module in model.modules():
            for key, parameter in module._parameters.items():
                empty = torch.empty(parameter.shape, device="cuda")
                module._parameters[key] = nn.Parameter(empty, requires_grad=False)
        tokens = torch.zeros(2, 32, dtype=torch.int64, device="cuda")
        with Operators() as operators, Attention() as attention:
            loss = model(tokens, tokens)
    assert loss.device.type == "cuda" and loss.dtype == torch.float32
    operators.assert_never_waits()
    attention.assert_flash_can_do_it(2)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_on_a_device_that_is_no_cpu(name):
    model = build(name)
    tokens = torch.zeros(2, 32, dtype=torch.int64, device="meta")
    with Operators() as operators, Attention() as attention:
        model(tokens, tokens).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters())
    operators.assert_never_waits()
    attention.assert_flash_can_do_it(2)


def test_an_update_on_a_gpu_is_one_kernel_that_does_not_wait():
    axes = ParameterAxes((MLP,), (EMBED,))
    with FakeTensorMode(), torch.no_grad():
        parameter = nn.Parameter(torch.empty(4, 8, device="cuda"), requires_grad=False)
        parameter.grad = torch.empty(4, 8, device="cuda")
        optimizer = AdamConfig().build({"weight": (parameter, axes)})
        with Operators() as operators:
            norm = gradient_norm([parameter.grad])
            is_bad = torch.empty((), dtype=torch.bool, device="cuda")
            apply_update(optimizer, clip_scale(norm, 1.0), is_bad)
    assert operators.names.count("aten::_fused_adamw_") == 1
    operators.assert_never_waits()


@pytest.mark.parametrize("name", MODELS)
def test_a_block_compiles_in_one_piece(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    model = build(name)
    inputs = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: inputs.append(args))
    tokens = torch.zeros(2, 32, dtype=torch.int64, device="meta")
    with torch.no_grad():
        model(tokens, tokens)
    handle.remove()
    torch.compiler.reset()
    torch.compile(model.blocks[0], backend=backend, fullgraph=True)(*inputs[0])
    assert len(graphs) == 1
