"""Where each of our parameters lies among the weights of transformers' models, and how."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ostro.core.errors import CheckpointError
from ostro.models import Gpt2Config, LlamaConfig, LmConfig

_BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Constants that older versions of transformers saved among the weights."""

_GPT2_BLOCK = {
    "norm_1": "ln_1", "attention.qkv": "attn.c_attn", "attention.out": "attn.c_proj",
    "norm_2": "ln_2", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj",
}  # fmt: skip
_LLAMA_BLOCK = {
    "attention.qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.out": ("self_attn.o_proj",),
    "mlp.gate": ("mlp.gate_proj",), "mlp.up": ("mlp.up_proj",), "mlp.down": ("mlp.down_proj",),
}  # fmt: skip


@dataclass(frozen=True)
class HfParameter:
    """One of our parameters, and what it is called and how it is laid out at Hugging Face.

    `export` and `load` reorder rows alone, so they serve whatever has the parameter's shape, and
    files that keep linear weights as we do; `conv1d` says that Hugging Face's are transposed.
    """

    ours: str
    theirs: tuple[str, ...]  # one name, or those of the separate queries, keys and values
    conv1d: bool = False
    heads: tuple[int, int] | None = None  # of `qkv`: key-value heads, and queries of each

    def export(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Ours -> a tensor for each of their names, not yet transposed."""
        if self.heads is None:
            return (tensor,)
        kv_heads, group = self.heads
        by_head = tensor.unflatten(0, (kv_heads, group + 2, -1))
        parts = tuple(part.flatten(0, 2) for part in by_head.split([group, 1, 1], 1))
        return parts if len(self.theirs) > 1 else (torch.cat(parts),)

    def load(self, *tensors: Tensor) -> Tensor:
        """A tensor for each of their names, no longer transposed -> ours."""
        if self.heads is None:
            return tensors[0]
        parts = tensors if len(tensors) > 1 else tensors[0].chunk(3)
        split = [part.unflatten(0, (self.heads[0], -1)) for part in parts]
        return torch.cat(split, 1).flatten(0, 1)


def gpt2_parameters(config: Gpt2Config) -> list[HfParameter]:
    """Every parameter of a GPT-2."""
    found = [
        HfParameter("token_embedding.weight", ("transformer.wte.weight",)),
        HfParameter("position_embedding.weight", ("transformer.wpe.weight",)),
    ]
    for kind in ("weight", "bias") if config.use_bias else ("weight",):
        for i in range(config.num_layers):
            for ours, theirs in _GPT2_BLOCK.items():
                conv1d = kind == "weight" and not theirs.startswith("ln")
                heads = (config.num_heads, 1) if ours == "attention.qkv" else None
                names = (f"blocks.{i}.{ours}.{kind}", (f"transformer.h.{i}.{theirs}.{kind}",))
                found.append(HfParameter(*names, conv1d, heads))
        found.append(HfParameter(f"final_norm.{kind}", (f"transformer.ln_f.{kind}",)))
    return found


def llama_parameters(config: LlamaConfig) -> list[HfParameter]:
    """Every parameter of a Llama."""
    found = [
        HfParameter("token_embedding.weight", ("model.embed_tokens.weight",)),
        HfParameter("final_norm.weight", ("model.norm.weight",)),
    ]
    if not config.tie_word_embeddings:
        found.append(HfParameter("head.weight", ("lm_head.weight",)))
    grouped = (config.num_kv_heads, config.num_heads // config.num_kv_heads)
    for i in range(config.num_layers):
        for ours, theirs in (("norm_1", "input"), ("norm_2", "post_attention")):
            name = f"model.layers.{i}.{theirs}_layernorm.weight"
            found.append(HfParameter(f"blocks.{i}.{ours}.weight", (name,)))
        for kind in ("weight", "bias") if config.use_bias else ("weight",):
            for ours, parts in _LLAMA_BLOCK.items():
                names = tuple(f"model.layers.{i}.{part}.{kind}" for part in parts)
                heads = grouped if ours == "attention.qkv" else None
                found.append(HfParameter(f"blocks.{i}.{ours}.{kind}", names, heads=heads))
    return found


def hf_parameters(config: LmConfig) -> list[HfParameter]:
    """Every parameter of a model that Hugging Face has too."""
    if isinstance(config, Gpt2Config):
        return gpt2_parameters(config)
    if isinstance(config, LlamaConfig):
        return llama_parameters(config)
    raise CheckpointError(
        f"model = {type(config).__name__} - Hugging Face's layout is known here of gpt2 and llama"
        " only - use one of these"
    )


def to_hf(config: LmConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under their names in their layout; may share memory with ours."""
    ours = [parameter.ours for parameter in hf_parameters(config)]
    refuse(differences(tensors, ours), "these are not the weights of this model")
    found = {}
    for parameter in hf_parameters(_with_biases(config)):
        tensor = tensors.get(parameter.ours)
        if tensor is None:  # transformers' GPT-2 always has biases: zeros change nothing
            weight = tensors[parameter.ours.removesuffix("bias") + "weight"]
            tensor = weight.new_zeros(len(weight))
        for name, part in zip(parameter.theirs, parameter.export(tensor), strict=True):
            found[name] = part.T if parameter.conv1d else part
    return found


def from_hf(config: LmConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their weights under our names in our layout; `CheckpointError` lists what does not fit."""
    parameters = hf_parameters(config)
    embedding = parameters[0].theirs[0]
    prefix = embedding.partition(".")[0] + "."
    found = {
        name if name.startswith((prefix, "lm_head.")) else prefix + name: tensor
        for name, tensor in tensors.items()
        if not name.endswith(_BUFFERS)
    }
    names = {name for parameter in parameters for name in parameter.theirs}
    wrong = []
    if "lm_head.weight" not in names and embedding not in found and "lm_head.weight" in found:
        found[embedding] = found.pop("lm_head.weight")  # tied, and saved under that name alone
    # A tied head is saved a second time by some, as the biases are that transformers always has.
    is_again = "lm_head.weight" in found.keys() - names and embedding in found
    if is_again and not torch.equal(found.pop("lm_head.weight"), found[embedding]):
        wrong.append(f"lm_head.weight is not {embedding}, to which it is tied here")
    for name in {n for p in hf_parameters(_with_biases(config)) for n in p.theirs} - names:
        if found.pop(name, torch.zeros(())).any():
            wrong.append(f"{name} is not zero, and model.use_bias is false")
    wrong += differences(found, names)
    positions = found.get("transformer.wpe.weight")
    if isinstance(config, Gpt2Config) and positions is not None:
        found["transformer.wpe.weight"] = positions[: config.seq_len]  # a shorter context will do
    if not wrong:
        wrong = [
            f"{name} has shape {tuple(found[name].shape)}, here it is {shape}"
            for name, shape in _shapes(config, len(found[embedding])).items()
            if name in found and tuple(found[name].shape) != shape
        ]
    refuse(wrong, "make the model section as in its config.json (use_hf_model_config: true)")
    return {
        p.ours: p.load(*(found[name].T if p.conv1d else found[name] for name in p.theirs))
        for p in parameters
    }


def _with_biases(config: LmConfig) -> LmConfig:
    return replace(config, use_bias=True) if isinstance(config, Gpt2Config) else config


def _shapes(config: LmConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Their names and shapes."""
    with torch.device("meta"):
        model = config.build(vocab_size)
    return {
        name: tuple(t.shape) for name, t in to_hf(config, dict(model.named_parameters())).items()
    }


def differences(tensors: Mapping[str, Tensor], names: Iterable[str]) -> list[str]:
    """What is missing and what is too much where there should be tensors of these names."""
    names = set(names)
    wrong = [f"{name} is missing" for name in sorted(names) if name not in tensors]
    return wrong + [f"{name} is unknown here" for name in tensors if name not in names]


def refuse(wrong: list[str], advice: str) -> None:
    """Raise a `CheckpointError` that lists the first mistakes, if there are any."""
    if wrong:
        more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
        raise CheckpointError(f"{'; '.join(wrong[:6])}{more} - {advice}")
