"""Kernels in C++ for training on CPUs: attention, linear layers, the head's loss, activations.

They need x86-64 with AVX-512 and bfloat16 (AMX where there is one), Linux and a C++ compiler, which
makes them in seconds at their first use; torch's own operators do the work elsewhere, with results
that differ by rounding only. Activations are bfloat16 or float32; sums and weights are float32.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from ostro.runtime.compile_cache import compiled_file

log = logging.getLogger("ostro")
_FLAGS = "-O3 -march=native -std=c++20 -fopenmp -shared -fPIC -w"
_is_wanted: bool | None = None
"""Whether to use the kernels. None: nobody has said, and bfloat16 alone is computed with them."""


def enable(wanted: bool | None) -> None:
    """Use the kernels wherever they apply, or nowhere; None: for bfloat16, as at the start."""
    global _is_wanted
    _is_wanted = wanted


@contextmanager
def scope() -> Iterator[None]:
    """At the end of the `with` block, undo what `enable` did inside it."""
    before = _is_wanted
    try:
        yield
    finally:
        enable(before)


def applies_to(x: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Whether a kernel that computes in `dtype` (by default the tensor's own) takes this tensor.

    It must be a plain tensor on the CPU, outside of a compilation. float32 needs `enable(True)`.
    """
    dtype = dtype or x.dtype
    return (
        _is_wanted is not False
        and (dtype == torch.bfloat16 or (dtype == torch.float32 and _is_wanted))
        and x.is_cpu
        and not torch.compiler.is_compiling()
        and type(x) is Tensor
        and available()
    )


def active_kind() -> str:
    """`native` or `torch`: what does the work on tensors of CPUs."""
    return "native" if _is_wanted is not False and available() else "torch"


def available() -> bool:
    """Whether this machine can run the kernels; makes them at the first call."""
    return not isinstance(_library(), str)


def unavailable_reason() -> str:
    """What the kernels lack here; empty where they run."""
    found = _library()
    return found if isinstance(found, str) else ""


@cache
def _library() -> ctypes.CDLL | str:
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "they are written for Linux on x86-64"
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no bfloat16 instructions"
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("c++") or "g++"]
    if shutil.which(compiler[0]) is None:
        return f"there is no C++ compiler ({compiler[0]}): install one such as g++"
    try:
        with compiled_file(_name(compiler), partial(_compile, compiler)) as path:
            return ctypes.CDLL(str(path))
    except subprocess.CalledProcessError as error:
        log.debug("%s", error.stderr)
        return f"{compiler[0]} could not compile them: {error.stderr.strip().splitlines()[-1:]}"
    except OSError as error:
        return str(error)


def _sources() -> list[Path]:
    return sorted((Path(__file__).parent / "csrc").glob("*.cpp"))


def _name(compiler: list[str]) -> str:
    """One for each source, compiler, torch and processor."""
    asked = [*compiler, "--version"]
    version = subprocess.run(asked, capture_output=True, check=True, text=True).stdout
    known = [f"{version}{torch.__version__}{_FLAGS}".encode(), _processor()]
    headers = sorted((Path(__file__).parent / "csrc").glob("*.h"))
    known += [path.read_bytes() for path in [*_sources(), *headers]]
    digest = hashlib.sha256(b"\0".join(known)).hexdigest()
    return f"kernels-{digest[:24]}"


def _compile(compiler: list[str], path: Path) -> None:
    log.info("compiling kernels for this CPU (once)")
    lib = Path(torch.__file__).parent / "lib"
    command = [*compiler, *_FLAGS.split(), *map(str, _sources()), "-o", str(path)]
    command += [f"-L{lib}", "-ltorch_cpu", f"-Wl,-rpath,{lib}"]
    subprocess.run(command, capture_output=True, check=True, text=True)


def _processor() -> bytes:
    """What the compiler looks at for `-march=native`."""
    with open("/proc/cpuinfo", "rb") as file:
        return b"".join(line for line in file if line.startswith(b"flags"))[:4096]


_KINDS = {
    bool: ctypes.c_bool,
    int: ctypes.c_int64,
    float: ctypes.c_double,
    type(None): ctypes.c_void_p,
}


def _call(name: str, *args: Tensor | int | float | bool | None) -> None:
    """Call a kernel: tensors as pointers, numbers as C sees them there."""
    if isinstance(args[0], Tensor) and args[0].dtype == torch.float32:
        name += "_float32"
    kernel = getattr(_library(), name)
    if kernel.argtypes is None:
        kernel.argtypes = [_KINDS.get(type(arg), ctypes.c_void_p) for arg in args]
        kernel.restype = None
    values = [arg if type(arg) in _KINDS else arg.data_ptr() for arg in args]
    shown = torch.autograd._profiler_enabled()  # which would not know of it
    with torch.profiler.record_function(f"ostro::{name}") if shown else nullcontext():
        kernel(*values)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, scale):
        batch, position, heads, rows, size = qkv.shape
        out = qkv.new_empty(batch, position, heads * (rows - 2) * size)
        log_sums = torch.empty(batch, heads, rows - 2, position)
        ctx.sizes = batch, position, heads, rows - 2, size, scale
        _call("attention_forward", qkv, out, log_sums, *ctx.sizes)
        ctx.save_for_backward(qkv, out, log_sums)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        qkv, out, log_sums = ctx.saved_tensors
        grad_qkv = torch.empty_like(qkv)
        grad = grad.contiguous()
        _call("attention_backward", qkv, out, grad, log_sums, grad_qkv, *ctx.sizes)
        return grad_qkv, None


def attention(qkv: Tensor, scale: float) -> Tensor | None:
    """Causal attention of a fused projection (batch, position, kv_heads, group + 2, head_size).

    For each key-value head: the queries of its group, its key, its value. Returns (batch, position,
    kv_heads * group * head_size), or None where the kernels cannot do it.
    """
    if not applies_to(qkv) or qkv.shape[-1] % 16 or not qkv.is_contiguous():
        return None
    return _Attention.apply(qkv, float(scale))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        rows, (outs, ins) = x.numel() // x.shape[-1], weight.shape
        y = x.new_empty(*x.shape[:-1], outs)
        _call("linear_forward", x, weight, bias, y, rows, ins, outs)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad = grad.contiguous()
        grad_x = torch.empty_like(x) if wanted[0] else None
        grad_weight = torch.empty_like(weight) if wanted[1] else None
        grad_bias = weight.new_empty(len(weight)) if wanted[2] else None
        rows, (outs, ins) = grad.numel() // grad.shape[-1], weight.shape
        gradients = (grad_x, grad_weight, grad_bias)
        _call("linear_backward", x, weight, grad, *gradients, rows, ins, outs)
        return gradients


MIN_ROWS = 32
"""Rows below which packing the weight costs more than multiplying with it."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """`x @ weight.T + bias`, the weights float32; None where the kernels cannot do it."""
    outs, ins = weight.shape
    fits = ins % 16 == 0 and outs % 16 == 0 and x.numel() >= MIN_ROWS * ins
    if not (fits and applies_to(x) and _is_plain(weight) and (bias is None or _is_plain(bias))):
        return None
    return _Linear.apply(x.contiguous(), weight, bias)


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype == torch.float32 and weight.is_contiguous() and weight.is_cpu


def gives_loss(hidden: Tensor, weight: Tensor) -> bool:
    """Whether `head_loss` can work on these."""
    return hidden.shape[-1] % 16 == 0 and applies_to(hidden) and _is_plain(weight)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    scale: float = 1.0,
    grad_hidden: Tensor | None = None,
    grad_weight: Tensor | None = None,
    *,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of each row, (rows,) float32, 0 where the target is -100.

    `hidden` (rows, embed), `weight` (vocab, embed) float32, `targets` (rows,) int64. The
    gradients of the losses' sum times `scale` are written into the tensors given. Logits of `chunk`
    rows are held at once; None: as many as were fastest, or fewer where the vocabulary is large.
    """
    best = 1536 if hidden.dtype == torch.bfloat16 else 1024
    chunk = chunk or max(64, min(best, 2**27 // len(weight)))
    losses = torch.empty(len(hidden))
    sizes = (len(hidden), *weight.shape, min(chunk, len(hidden)), float(scale))
    _call("head_loss", hidden, weight, targets, losses, grad_hidden, grad_weight, *sizes)
    return losses


class _Elementwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, name, *inputs):
        ctx.name = name
        ctx.save_for_backward(*inputs)
        out = torch.empty_like(inputs[0])
        _call(f"{name}_forward", *inputs, out, out.numel())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(x) for x in inputs]
        _call(f"{ctx.name}_backward", *inputs, grad.contiguous(), *gradients, grad.numel())
        return None, *gradients


def gelu(x: Tensor) -> Tensor | None:
    """GELU by its tanh approximation; None where the kernels cannot do it."""
    return _Elementwise.apply("gelu", x) if applies_to(x) and x.is_contiguous() else None


def silu_gate(gate: Tensor, up: Tensor) -> Tensor | None:
    """`silu(gate) * up`; None where the kernels cannot do it."""
    fits = applies_to(gate) and gate.is_contiguous() and up.is_contiguous()
    return _Elementwise.apply("silu_gate", gate, up) if fits else None


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, added, weight, bias, eps, dtype, is_centred):
        rows, size = x.numel() // x.shape[-1], x.shape[-1]
        total = x if added is None else torch.empty_like(x)
        out, scales = torch.empty_like(x, dtype=dtype), torch.empty(rows)
        means = torch.empty(rows) if is_centred else None
        _call("norm_forward", out, x, added, total, weight, bias, means, scales, rows, size, eps)
        ctx.save_for_backward(total, weight, bias, means, scales)
        ctx.set_materialize_grads(False)
        ctx.adds = added is not None
        return total, out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_total, grad):
        total, weight, bias, means, scales = ctx.saved_tensors
        grad = grad.contiguous()
        like = total, grad if ctx.adds else None, weight, bias
        gradients = [None if each is None else torch.empty_like(each) for each in like]
        grad_total = None if grad_total is None else grad_total.contiguous()
        kept, sizes = (total, weight, means, scales), (len(scales), total.shape[-1])
        _call("norm_backward", grad, grad_total, *kept, *gradients, *sizes)
        return *gradients, None, None, None


def normalise(
    x: Tensor,
    added: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype,
    is_centred: bool,
) -> tuple[Tensor, Tensor] | None:
    """`x + added`, float32, and that normalised over the last dim, as `dtype`.

    `(x - mean) * weight / sqrt(variance + eps) + bias`, the mean taken as 0 unless `is_centred`.
    None where the kernels cannot do it.
    """
    fits = x.shape[-1] % 16 == 0 and applies_to(x, dtype) and _is_plain(x) and _is_plain(weight)
    fits = fits and (bias is None or _is_plain(bias))
    fits = fits and (added is None or (added.dtype == dtype and added.is_contiguous()))
    if not fits:
        return None
    return _Norm.apply(x, added, weight, bias, float(eps), dtype, is_centred)


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _turned(qkv, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return _turned(grad.contiguous(), *ctx.saved_tensors, -1.0), None, None


def _turned(qkv: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    batch, position, *sizes = qkv.shape
    out, num_angles = torch.empty_like(qkv), cos.numel() // cos.shape[-1]
    _call("rotary", qkv, cos, sin, out, batch * position, num_angles, *sizes, sign)
    return out


def rotary(qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Turn all but the values of (batch, position, kv_heads, group + 2, head_size).

    Dim i turns against dim i + head_size / 2 by the angles of which `cos` and `sin` are (batch or
    1, position, 1, 1, head_size / 2). None where the kernels cannot do it.
    """
    fits = qkv.shape[-1] % 32 == 0 and applies_to(qkv) and qkv.is_contiguous()
    fits = fits and cos.dtype == sin.dtype == torch.float32
    return _Rotary.apply(qkv, cos.contiguous(), sin.contiguous()) if fits else None


def norms(gradients: Sequence[Tensor]) -> Tensor | None:
    """The 2-norm of each gradient, float32 (gradients,); None where the kernels are not in use."""
    if not (_is_wanted and all(map(_is_own, gradients)) and available()):
        return None
    squares = torch.empty(len(gradients), dtype=torch.float64)
    _call("squares", *_table([gradients]), squares)
    return squares.sqrt().float()


def adamw(optimizer: torch.optim.Optimizer, grad_scale: Tensor | None) -> bool:
    """Step a `torch.optim.AdamW` with its gradients divided by a scalar; None is 1.

    False, and nothing is done, where the kernels are not in use or cannot do it.
    """
    if not (_is_wanted and type(optimizer) is torch.optim.AdamW and available()):
        return False
    groups = []
    for group in optimizer.param_groups:
        params = [p for p in group["params"] if p.grad is not None]
        state = [optimizer.state[p] for p in params]
        if not all(state):  # one of the user's own, before the first step
            return False
        own = [[each[key] for each in state] for key in ("exp_avg", "exp_avg_sq", "step")]
        tensors = [params, *own, [p.grad for p in params]]
        if (
            group["amsgrad"]
            or group["maximize"]
            or not all(_is_own(x) for row in tensors for x in row)
        ):
            return False
        groups.append((group, tensors))
    scale = 1.0 if grad_scale is None else grad_scale.item()
    for group, tensors in groups:
        numbers = (group["lr"], *group["betas"], group["eps"], group["weight_decay"], scale)
        _call("adamw", *_table(tensors), *map(float, numbers))
    return True


def _is_own(x: Tensor) -> bool:
    """Whether its memory is all of it, float32 on this CPU."""
    return type(x) in (Tensor, torch.nn.Parameter) and _is_plain(x)


def _table(tensors: Sequence[Sequence[Tensor]]) -> tuple[Tensor, Tensor, int]:
    """Addresses: of what stands first in each sequence, then second, and so on; sizes; how many."""
    addresses = [x.data_ptr() for row in zip(*tensors, strict=True) for x in row]
    sizes = [x.numel() for x in tensors[0]]
    return torch.tensor(addresses), torch.tensor(sizes), len(sizes)
