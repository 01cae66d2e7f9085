"""Our model settings as a `config.json` of transformers, and back."""

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ostro.config import check
from ostro.core.errors import CheckpointError, ConfigError
from ostro.models import Gpt2Config, LlamaConfig, LmConfig
from ostro.nn import ACTIVATIONS
from ostro.nn.rotary import RotaryConfig

# Our fields -> theirs, with the value that transformers takes where config.json names none.
_GPT2_FIELDS: dict[str, tuple[str, Any]] = {
    "seq_len": ("n_positions", 1024), "hidden_dim": ("n_embd", 768),
    "num_layers": ("n_layer", 12), "num_heads": ("n_head", 12),
    "initializer_range": ("initializer_range", 0.02), "embed_pdrop": ("embd_pdrop", 0.1),
    "resid_pdrop": ("resid_pdrop", 0.1), "attn_pdrop": ("attn_pdrop", 0.1),
    "layer_norm_epsilon": ("layer_norm_epsilon", 1e-5),
    "activation_function": ("activation_function", "gelu_new"),
    "scale_attn_by_inverse_layer_idx": ("scale_attn_by_inverse_layer_idx", False),
    "upcast_attn": ("reorder_and_upcast_attn", False),
}  # fmt: skip
_LLAMA_FIELDS: dict[str, tuple[str, Any]] = {
    "seq_len": ("max_position_embeddings", 2048), "hidden_dim": ("hidden_size", 4096),
    "intermediate_dim": ("intermediate_size", 11008), "num_layers": ("num_hidden_layers", 32),
    "num_heads": ("num_attention_heads", 32), "num_kv_heads": ("num_key_value_heads", None),
    "head_dim": ("head_dim", None), "activation_function": ("hidden_act", "silu"),
    "initializer_range": ("initializer_range", 0.02), "layer_norm_epsilon": ("rms_norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_word_embeddings", False), "use_bias": ("attention_bias", False),
}  # fmt: skip
# Fields of theirs for which our models know one value only.
_GPT2_FIXED = {
    "scale_attn_weights": True, "add_cross_attention": False, "tie_word_embeddings": True,
    "quantization_config": None,
}  # fmt: skip
_LLAMA_FIXED = {"attention_dropout": 0.0, "quantization_config": None}
# Settings of ours that need not be those the weights were trained with, or that shapes tell.
_FREE = {
    "seq_len", "head_dim", "use_bias", "rope", "initializer_range", "embed_pdrop", "resid_pdrop",
    "attn_pdrop", "upcast_attn", "gradient_checkpointing",
}  # fmt: skip


def hf_config(config: LmConfig, vocab_size: int, eos_id: int | None) -> dict[str, Any]:
    """The `config.json` of this model."""
    found = {"vocab_size": vocab_size, "bos_token_id": eos_id, "eos_token_id": eos_id}
    if isinstance(config, Gpt2Config):
        found |= {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}
        found |= {theirs: getattr(config, ours) for ours, (theirs, _) in _GPT2_FIELDS.items()}
        return found | {"n_inner": config.mlp_scale * config.hidden_dim}
    assert isinstance(config, LlamaConfig), "to_hf refuses all others"
    if config.hidden_dim % config.num_heads:
        raise CheckpointError(
            f"model.num_heads = {config.num_heads} - must divide hidden_dim = {config.hidden_dim}"
            " for transformers, also where head_dim is set - such a model cannot be exported"
        )
    found |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    found |= {theirs: getattr(config, ours) for ours, (theirs, _) in _LLAMA_FIELDS.items()}
    found |= {"head_dim": config.head_size, "mlp_bias": config.use_bias}
    return found | _hf_rope(config.rope)


def _hf_rope(rope: RotaryConfig) -> dict[str, Any]:
    """In the form of transformers 4, which 5 reads too."""
    kind = rope.get_choice_name(type(rope))
    values = {item.name: getattr(rope, item.name) for item in fields(rope)}
    theta = values.pop("theta")
    if kind == "default":  # has no factor there; linear is the same with one
        kind = "linear" if values["factor"] != 1 else None
    values = {name: value for name, value in values.items() if value is not None}
    return {"rope_theta": theta, "rope_scaling": {"rope_type": kind, **values} if kind else None}


def lm_config(config: Mapping[str, Any]) -> tuple[LmConfig, int]:
    """The model and the vocabulary that a `config.json` describes.

    `CheckpointError` names the field that none of our models can follow.
    """
    family = config.get("model_type")
    if family not in ("gpt2", "llama"):
        raise _unfit("model_type", family, "must be gpt2 or llama")
    is_llama = family == "llama"
    for name, value in (_LLAMA_FIXED if is_llama else _GPT2_FIXED).items():
        if config.get(name, value) != value:
            raise _unfit(name, config[name], f"here it is always {json.dumps(value)}")
    known = _LLAMA_FIELDS if is_llama else _GPT2_FIELDS
    values = {ours: config.get(theirs, default) for ours, (theirs, default) in known.items()}
    try:
        if is_llama:
            if bool(config.get("mlp_bias")) != bool(values["use_bias"]):
                raise _unfit("mlp_bias", config.get("mlp_bias"), "must be as attention_bias")
            values["num_kv_heads"] = values["num_kv_heads"] or values["num_heads"]
            found: LmConfig = LlamaConfig(**values, rope=_rope(config, values["seq_len"]))
        else:
            inner = config.get("n_inner") or 4 * values["hidden_dim"]
            if inner % values["hidden_dim"]:
                raise _unfit("n_inner", inner, f"must be a multiple of {values['hidden_dim']}")
            found = Gpt2Config(**values, mlp_scale=inner // values["hidden_dim"])
        check(found)
        return found, int(config.get("vocab_size", 32000 if is_llama else 50257))
    except (ConfigError, TypeError, ValueError) as error:
        raise CheckpointError(f"config.json - describes no model of ours: {error}") from error


def setting_differences(ours: LmConfig, theirs: LmConfig) -> list[str]:
    """The settings of ours that make other functions of the same weights."""
    if type(ours) is not type(theirs):
        return [f"it is a {type(theirs).__name__}, model.type gives a {type(ours).__name__}"]
    names = [item.name for item in fields(ours) if item.name not in _FREE]
    activations = {ACTIVATIONS[each.activation_function] for each in (ours, theirs)}
    if len(activations) == 1:  # several names for one function
        names.remove("activation_function")
    return [
        f"model.{name} = {getattr(ours, name)}, there it is {getattr(theirs, name)}"
        for name in names
        if getattr(ours, name) != getattr(theirs, name)
    ]


def _rope(config: Mapping[str, Any], seq_len: int) -> RotaryConfig:
    """From `rope_parameters` (transformers 5), or `rope_scaling` and `rope_theta` (4)."""
    given = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = given.pop("rope_type", None) or given.pop("type", None) or "default"
    given.pop("type", None)
    if kind not in RotaryConfig.get_known_choices():
        known = ", ".join(RotaryConfig.get_known_choices())
        raise _unfit("rope_type", kind, f"must be one of {known}")
    chosen = RotaryConfig.get_choice_class(kind)
    names = {item.name for item in fields(chosen)}
    theta = given.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
    values = {name: value for name, value in given.items() if value is not None}
    for name in values.keys() - names:
        raise _unfit(name, values[name], f"is no setting of our rope {kind}")
    for name in {"factor", "low_freq_factor", "high_freq_factor"} & names - values.keys():
        if kind != "default":
            raise _unfit(name, None, f"rope {kind} needs it")
    if "original_max_position_embeddings" in names:
        values.setdefault("original_max_position_embeddings", seq_len)
    return chosen(theta=theta, **values)


def _unfit(name: str, value: Any, rule: str) -> CheckpointError:
    advice = "this model cannot be used here, take another"
    return CheckpointError(f"config.json: {name} = {json.dumps(value)} - {rule} - {advice}")
