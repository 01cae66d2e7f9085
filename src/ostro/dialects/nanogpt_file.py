"""nanoGPT's `ckpt.pt`: written so that nanoGPT's own scripts read it, and read as they write it.

    model          its GPT's state_dict          iter_num, best_val_loss
    optimizer      torch's AdamW state_dict      config          its settings, by its names
    model_args     n_layer ... vocab_size        ostro           what a bit-exact resume needs

The last key is ours. Without it a resumed run has the weights, moments and position, but not the
random state, the loss scale, or the run's own configuration and tokenizer.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import yaml
from torch import Tensor

from ostro.checkpoint import State, register_format
from ostro.config import dump_yaml, load
from ostro.data.tokenizer import TokenizerConfig
from ostro.dialects import nanogpt
from ostro.errors import CheckpointError, OstroError
from ostro.lm_config import TrainLmConfig
from ostro.units import Precision, resolve_steps

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
_TOP = {
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "final_norm": "transformer.ln_f",
}
_BLOCK = {
    "norm_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "norm_2": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
}


def their_name(name: str) -> str:
    """Our parameter name -> nanoGPT's."""
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"transformer.h.{layer}.{_BLOCK[part]}.{kind}"


def their_order(tensor: Tensor, num_heads: int) -> Tensor:
    """Rows (heads, 3, head_size) of our `qkv`, or of its moments, as (3, heads, head_size)."""
    parts = tensor.unflatten(0, (num_heads, 3, -1))
    return parts.transpose(0, 1).flatten(0, 2).contiguous()


def our_order(tensor: Tensor, num_heads: int) -> Tensor:
    """The inverse of `their_order`."""
    return tensor.unflatten(0, (3, num_heads, -1)).transpose(0, 1).flatten(0, 2).contiguous()


class NanoGptFormat:
    """See `ostro.checkpoint.single_file.FileFormat`."""

    def pack(self, state: State, step: int) -> dict[str, Any]:
        """The mapping that nanoGPT's `train.py` and `sample.py` expect."""
        native = yaml.safe_load(state.texts["config.yaml"])
        heads, names = native["model"]["num_heads"], list(state.tensors["model"])
        if native["model"]["type"] != "gpt2":
            raise CheckpointError("checkpointer.format = nanogpt - holds GPT-2 models only")

        def tensor(group: str, name: str, key: str = "") -> Tensor:
            value = state.tensors[group][name + key]
            is_qkv = ".attention.qkv." in name and value.ndim > 0
            return their_order(value, heads) if is_qkv else value

        weights = {their_name(name): tensor("model", name) for name in names}
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        best = state.values.get("best_eval_loss")
        config = their_config(native, int(state.values.get("num_ranks", 1)))
        model_args = {key: config[key] for key in MODEL_ARGS if key in config}
        model_args["vocab_size"] = len(weights["lm_head.weight"])
        return {
            "model": weights,
            "optimizer": _their_optimizer(native["optimizer"], names, tensor),
            "model_args": model_args,
            "iter_num": state.values["step"],
            "best_val_loss": 1e9 if best is None else best,
            "config": config,
            "ostro": {
                "state": dict(state.tensors["state"]),
                "values": dict(state.values),
                "texts": dict(state.texts),
            },
        }

    def unpack(self, content: Mapping[str, Any], where: str) -> State:
        """Ours from a file of theirs or ours; compiled and tied names are understood."""
        try:
            args = content["model_args"]
            heads = int(args["n_head"])
            theirs = {
                name.removeprefix("_orig_mod."): value for name, value in content["model"].items()
            }
            weights = _our_weights(theirs, heads, where)
            own = content.get("ostro") or {}
            best = content["best_val_loss"]
            values = dict(own.get("values") or {}) | {
                "step": int(content["iter_num"]),
                "best_eval_loss": None if float(best) >= 1e9 else float(best),
                "is_foreign": not own,
            }
            optimizer = _our_optimizer(content["optimizer"], weights, heads)
            texts = own.get("texts") or _texts(content)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{where} - is no checkpoint that nanoGPT wrote: {type(error).__name__}: {error}"
            ) from error
        return State(
            {"model": weights, "optimizer": optimizer, "state": dict(own.get("state") or {})},
            values,
            texts,
        )

    def fits(self, content: Mapping[str, Any]) -> bool:
        """nanoGPT's files have `model_args`."""
        return "model_args" in content and "model" in content


register_format("nanogpt", NanoGptFormat())


def _grouped(names: list[str], ndims: Mapping[str, int]) -> list[list[str]]:
    """nanoGPT's two groups: matrices and tables, which decay, then biases and norms."""
    return [[n for n in names if (ndims[n] >= 2) == decays] for decays in (True, False)]


def _their_optimizer(config: Mapping[str, Any], names: list[str], tensor: Any) -> dict[str, Any]:
    ndims = {name: tensor("model", name).ndim for name in names}
    groups = _grouped(names, ndims)
    index = {name: number for number, name in enumerate(n for group in groups for n in group)}
    options = {
        "lr": config["learning_rate"],
        "betas": (config["beta1"], config["beta2"]),
        "eps": config["epsilon"],
        "amsgrad": False,
        "foreach": None,
        "maximize": False,
        "capturable": False,
        "differentiable": False,
        "fused": True,
        "decoupled_weight_decay": True,
    }
    decay = (config["weight_decay"], 0.0)
    return {
        "state": {
            index[name]: {
                key: tensor("optimizer", name, f".{key}")
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            for name in index
        },
        "param_groups": [
            {**options, "weight_decay": rate, "params": [index[name] for name in group]}
            for rate, group in zip(decay, groups, strict=True)
        ],
    }


def _our_weights(theirs: Mapping[str, Tensor], heads: int, where: str) -> dict[str, Tensor]:
    layers = {int(m[1]) for n in theirs if (m := re.match(r"transformer\.h\.(\d+)\.", n))}
    modules = [f"blocks.{layer}.{part}" for layer in sorted(layers) for part in _BLOCK]
    top = list(_TOP)
    weights = {}
    for module in [*top[:2], *modules, *top[2:]]:
        for kind in ("weight", "bias"):
            name = f"{module}.{kind}"
            if (value := theirs.get(their_name(name))) is not None:
                is_qkv = ".attention.qkv." in name
                weights[name] = our_order(value, heads) if is_qkv else value
    head = theirs.get("lm_head.weight")
    if head is not None and not torch.equal(head, weights["token_embedding.weight"]):
        raise CheckpointError(f"{where} - its head is not tied to the embedding, as GPT-2's is")
    return weights


def _our_optimizer(
    saved: Mapping[str, Any], weights: Mapping[str, Tensor], heads: int
) -> dict[str, Tensor]:
    ndims = {name: value.ndim for name, value in weights.items()}
    groups = _grouped(list(weights), ndims)
    found = {}
    for names, group in zip(groups, saved["param_groups"], strict=True):
        for name, index in zip(names, group["params"], strict=True):
            for key, value in saved["state"][index].items():
                value = torch.as_tensor(value, dtype=torch.float32)
                is_qkv = ".attention.qkv." in name and value.ndim > 0
                found[f"{name}.{key}"] = our_order(value, heads) if is_qkv else value
    return found


def _texts(content: Mapping[str, Any]) -> dict[str, str]:
    """The native configuration, and the tokenizer if it is at hand, of a file of theirs."""
    known = {key: value for key, value in content["config"].items() if key in nanogpt.names()}
    known |= {key: content["model_args"][key] for key in nanogpt.ARCHITECTURE}
    known["init_from"], known["device"], known["backend"] = "scratch", "cpu", "gloo"
    flags = [f"--{key}={value}" for key, value in known.items()]
    made = nanogpt.translate(load(nanogpt.NanoGptConfig, [], flags), environ={})
    made.set("vocab_size", content["model_args"]["vocab_size"])
    config = load(TrainLmConfig, [], [], layers=[made.layer]).config
    return {"config.yaml": dump_yaml(config)} | tokenizer_text(config.data.tokenizer)


def tokenizer_text(tokenizer: TokenizerConfig) -> dict[str, str]:
    """The file of a tokenizer; empty where it is not on this machine."""
    try:
        return {"tokenizer.json": tokenizer.build(offline=True).to_text()}
    except OstroError:
        return {}


def their_config(native: Mapping[str, Any], num_ranks: int) -> dict[str, Any]:
    """nanoGPT's settings for a resolved native configuration on so many processes."""
    trainer, model, optimizer = native["trainer"], native["model"], native["optimizer"]
    trackers = trainer["tracker"] if isinstance(trainer["tracker"], list) else [trainer["tracker"]]
    wandb = next((t for t in trackers if t["type"] == "wandb"), None)
    folder = str((native["data"].get("source") or {}).get("dir") or "data/unknown")
    batch, micro = trainer["train_batch_size"], trainer["per_device_parallelism"]
    is_plain = isinstance(batch, int)
    micro = micro if micro and micro > 0 else (batch // num_ranks if is_plain else 1)
    num_steps = trainer["num_train_steps"]
    peak = optimizer["learning_rate"]
    return {
        "out_dir": trainer["checkpointer"]["base_path"].removesuffix("/."),
        "log_interval": trainer["log_interval"],
        "eval_interval": trainer["steps_per_eval"] or num_steps,
        "eval_iters": trainer["max_eval_batches"] or 200,
        "eval_only": trainer["eval_only"],
        "always_save_checkpoint": trainer["checkpointer"]["save_after_eval"] != "improved",
        "init_from": "scratch",
        "wandb_log": wandb is not None,
        "wandb_project": (wandb or {}).get("project") or nanogpt.NanoGptConfig.wandb_project,
        "wandb_run_name": (wandb or {}).get("name") or nanogpt.NanoGptConfig.wandb_run_name,
        "dataset": folder.rstrip("/").rpartition("/")[2],
        "gradient_accumulation_steps": batch // (micro * num_ranks) if is_plain else 1,
        "batch_size": micro,
        "block_size": model["seq_len"],
        "n_layer": model["num_layers"],
        "n_head": model["num_heads"],
        "n_embd": model["hidden_dim"],
        "dropout": model["resid_pdrop"],
        "bias": model["use_bias"],
        "learning_rate": peak,
        "max_iters": num_steps,
        "weight_decay": optimizer["weight_decay"],
        "beta1": optimizer["beta1"],
        "beta2": optimizer["beta2"],
        "grad_clip": optimizer["max_grad_norm"] or 0.0,
        "decay_lr": optimizer["lr_schedule"].get("type") != "constant",
        "warmup_iters": resolve_steps(optimizer["warmup"], num_steps),
        "lr_decay_iters": optimizer["schedule_steps"] or num_steps,
        "min_lr": peak * optimizer["min_lr_ratio"],
        "backend": "nccl" if trainer["distributed"]["backend"] == "nccl" else "gloo",
        "device": trainer["device"],
        "dtype": Precision.from_text(trainer["mp"]).compute,
        "compile": trainer["compile"],
        "seed": trainer["seed"],
    }
