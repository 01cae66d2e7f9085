"""The kernel of generation: `decode.cpp`, and what it is told of a model."""

import ctypes
from collections.abc import Mapping, Sequence

from torch import Tensor

from ostro.kernels import _library

_POINTERS = [
    "norm_1", "norm_1_bias", "qkv", "qkv_bias", "out", "out_bias", "norm_2", "norm_2_bias",
    "gate", "gate_bias", "up", "up_bias", "down", "down_bias", "keys", "values",
]  # fmt: skip
_SIZES = [
    "is_bf16", "num_layers", "embed", "kv_heads", "group", "head_size", "mlp", "vocab",
    "capacity", "rms", "activation",
]  # fmt: skip
_BY_NUMBER = [
    ("relu",),
    ("silu", "swish"),
    ("gelu", "gelu_python"),
    ("gelu_new", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_fast", "gelu_accurate"),
    ("quick_gelu",),
    ("tanh",),
]
ACTIVATIONS = {name: number for number, names in enumerate(_BY_NUMBER) for name in names}


class _Layer(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in _POINTERS), ("scale", ctypes.c_double)]


class _Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        ("eps", ctypes.c_double),
        *((x, ctypes.c_void_p) for x in ("final_norm", "final_norm_bias", "head", "cos", "sin")),
    ]


def _fill(structure: ctypes.Structure, values: Mapping[str, float | Tensor | None]) -> None:
    for name, value in values.items():
        is_tensor = isinstance(value, Tensor)
        setattr(structure, name, value.data_ptr() if is_tensor else value)


class Decoder:
    """Steps of one token for each row of a batch.

    `layers` and `model` name what the structures in `decode.cpp` hold: contiguous tensors of
    one dtype (norms, cos and sin: float32), sizes, numbers. Tensors have to stay where they are.
    """

    def __init__(
        self,
        model: Mapping[str, float | Tensor | None],
        layers: Sequence[Mapping[str, float | Tensor | None]],
    ):
        library = _library()
        assert not isinstance(library, str), library
        self._decode, self._kept = library.ostro_decode, (model, layers)
        self._model, self._layers = _Model(), (_Layer * len(layers))()
        _fill(self._model, {**model, "num_layers": len(layers)})
        for structure, values in zip(self._layers, layers, strict=True):
            _fill(structure, values)

    def step(self, x: Tensor, positions: Tensor) -> Tensor:
        """Embedded tokens, float32 (rows, embed), which are overwritten, and their positions,
        int64 (rows,), to logits, float32 (rows, vocab). Keys and values go into the caches."""
        logits = x.new_empty(len(x), self._model.vocab)
        pointers = (ctypes.c_void_p(each.data_ptr()) for each in (positions, x, logits))
        rows = ctypes.c_int64(len(x))
        self._decode(ctypes.byref(self._model), self._layers, rows, *pointers)
        return logits
