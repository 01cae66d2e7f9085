"""nanoGPT's `ckpt.pt`: written so that nanoGPT's own scripts read it, and read as they write it.

    model          its GPT's state_dict          iter_num, best_val_loss
    optimizer      torch's AdamW state_dict      config          its settings, by its names
    model_args     n_layer ... vocab_size        ostro           what a bit-exact resume needs

The last key is ours. Without it a resumed run has the weights, moments and position, but not the
random state, the loss scale, or the run's own configuration and tokenizer.
"""

from collections.abc import Mapping
from functools import reduce
from operator import getitem
from typing import Any

import torch
import yaml
from torch import Tensor

from ostro.checkpoint import State, read_settings
from ostro.compat.nanogpt import settings
from ostro.config import dump_yaml, load
from ostro.core.errors import CheckpointError, OstroError
from ostro.core.units import Precision, resolve_steps
from ostro.data.tokenizer_config import TokenizerConfig
from ostro.lm_config import TrainLmConfig
from ostro.models import Gpt2Config
from ostro.models.hf.layout import HfParameter, gpt2_parameters

MODEL_ARGS = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")


class NanoGptFormat:
    """See `ostro.checkpoint.single_file.FileFormat`."""

    def pack(self, state: State) -> dict[str, Any]:
        """The mapping that nanoGPT's `train.py` and `sample.py` expect."""
        native = yaml.safe_load(state.texts["config.yaml"])
        if native["model"]["type"] != "gpt2":
            raise CheckpointError("checkpointer.format = nanogpt - holds GPT-2 models only")
        parameters = {p.ours: p for p in gpt2_parameters(_model(native["model"]))}
        weights = {
            parameters[name].theirs[0]: _theirs(parameters[name], tensor)
            for name, tensor in state.tensors["model"].items()
        }
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
        best = state.values.get("best_eval_loss")
        config = their_config(native, state.values["made_by"]["num_ranks"])
        model_args = {key: config[key] for key in MODEL_ARGS if key in config}
        model_args["vocab_size"] = len(weights["lm_head.weight"])
        return {
            "model": weights,
            "optimizer": _their_optimizer(native["optimizer"], state, parameters),
            "model_args": model_args,
            "iter_num": state.values["step"],
            "best_val_loss": 1e9 if best is None else best,
            "config": config,
            "ostro": {"state": dict(state.tensors["state"]), "values": dict(state.values),
                      "texts": dict(state.texts)},
        }  # fmt: skip

    def unpack(self, content: Mapping[str, Any], where: str) -> State:
        """Ours from a file of theirs or ours; compiled and tied names are understood."""
        try:
            args = content["model_args"]
            model = {"num_layers": args["n_layer"], "num_heads": args["n_head"]}
            model |= {"hidden_dim": args["n_embd"], "use_bias": args["bias"]}
            parameters = {p.theirs[0]: p for p in gpt2_parameters(_model(model))}
            weights = _our_weights(content["model"], parameters, where)
            own = content.get("ostro") or {}
            # A file without an optimizer is there for its weights: it need not say more.
            lenient = {} if "optimizer" in content else {"best_val_loss": 1e9, "iter_num": 0}
            content = {"config": {}, **lenient, **content}
            best = content["best_val_loss"]
            values = dict(own.get("values") or {}) | {
                "step": int(content["iter_num"]),
                "best_eval_loss": None if float(best) >= 1e9 else float(best),
                "is_foreign": not own,
            }
            groups = {"model": weights, "state": dict(own.get("state") or {})}
            if "optimizer" in content:
                by_name = {p.ours: p for p in parameters.values()}
                groups["optimizer"] = _our_optimizer(content["optimizer"], weights, by_name)
            texts = own.get("texts") or _texts(content)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise CheckpointError(
                f"{where} - is no checkpoint that nanoGPT wrote: {type(error).__name__}: {error}"
            ) from error
        return State(groups, values, texts)

    def fits(self, content: Mapping[str, Any]) -> bool:
        """nanoGPT's files have `model_args`."""
        parts = (content.get("model_args"), content.get("ostro") or {})
        return "model" in content and all(isinstance(part, dict) for part in parts)


FORMAT = NanoGptFormat()
"""What `checkpointer.format: nanogpt` stands for."""


def _grouped(names: list[str], ndims: Mapping[str, int]) -> list[list[str]]:
    """nanoGPT's two groups: matrices and tables, which decay, then biases and norms."""
    return [[n for n in names if (ndims[n] >= 2) == decays] for decays in (True, False)]


def _model(settings: Mapping[str, Any]) -> Gpt2Config:
    names = ("num_layers", "num_heads", "hidden_dim", "use_bias")
    return Gpt2Config(**{name: settings[name] for name in names})


def _theirs(parameter: HfParameter, tensor: Tensor) -> Tensor:
    """A weight or a moment as nanoGPT lays it out; scalars stay."""
    return parameter.export(tensor)[0].contiguous() if tensor.ndim else tensor


def _their_optimizer(
    config: Mapping[str, Any], state: State, parameters: Mapping[str, HfParameter]
) -> dict[str, Any]:
    weights, moments = state.tensors["model"], state.tensors["optimizer"]
    groups = _grouped(list(weights), {name: tensor.ndim for name, tensor in weights.items()})
    index = {name: number for number, name in enumerate(n for group in groups for n in group)}
    options = {
        "lr": config["learning_rate"],
        "betas": (config["beta1"], config["beta2"]),
        "eps": config["epsilon"],
        **dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False),
        "foreach": None,
        "fused": True,
        "decoupled_weight_decay": True,
    }
    decay = (config["weight_decay"], 0.0)
    return {
        "state": {
            number: {
                key: _theirs(parameters[name], moments[f"{name}.{key}"])
                for key in ("step", "exp_avg", "exp_avg_sq")
            }
            for name, number in index.items()
        },
        "param_groups": [
            {**options, "weight_decay": rate, "params": [index[name] for name in group]}
            for rate, group in zip(decay, groups, strict=True)
        ],
    }


def _our_weights(
    saved: Mapping[str, Tensor], parameters: Mapping[str, HfParameter], where: str
) -> dict[str, Tensor]:
    theirs = {name.removeprefix("_orig_mod."): value for name, value in saved.items()}
    head = theirs.pop("lm_head.weight", None)
    theirs = {name: value for name, value in theirs.items() if not name.endswith(".attn.bias")}
    if set(theirs) != set(parameters):
        wrong = ", ".join(sorted(set(theirs) ^ set(parameters))[:4])
        raise CheckpointError(f"{where} - its weights are not those of its model_args: {wrong}")
    weights = {parameters[name].ours: parameters[name].load(t) for name, t in theirs.items()}
    if head is not None and not torch.equal(head, weights["token_embedding.weight"]):
        raise CheckpointError(f"{where} - its head is not tied to the embedding, as GPT-2's is")
    return weights


def _our_optimizer(
    saved: Mapping[str, Any], weights: Mapping[str, Tensor], parameters: Mapping[str, HfParameter]
) -> dict[str, Tensor]:
    groups = _grouped(list(weights), {name: value.ndim for name, value in weights.items()})
    found = {}
    for names, group in zip(groups, saved["param_groups"], strict=True):
        for name, index in zip(names, group["params"], strict=True):
            for key, value in saved["state"][index].items():
                tensor = torch.as_tensor(value, dtype=torch.float32)
                found[f"{name}.{key}"] = parameters[name].load(tensor) if tensor.ndim else tensor
    return found


def _texts(content: Mapping[str, Any]) -> dict[str, str]:
    """The native configuration, and the tokenizer if it is at hand, of a file of theirs."""
    known = {key: value for key, value in content["config"].items() if key in settings.names()}
    known |= {key: content["model_args"][key] for key in settings.ARCHITECTURE}
    known["init_from"], known["device"], known["backend"] = "scratch", "cpu", "gloo"
    flags = [f"--{key}={value}" for key, value in known.items()]
    made = settings.translate(load(settings.NanoGptConfig, [], flags), environ={})
    made.set("vocab_size", content["model_args"]["vocab_size"])
    config = load(TrainLmConfig, [], [], layers=[made.layer]).config
    return {"config.yaml": dump_yaml(config)} | tokenizer_text(config.data.tokenizer)


def own_settings(content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What nanoGPT's settings do not say of the model, where we wrote the file."""
    texts = (content.get("ostro") or {}).get("texts")
    text = texts.get("config.yaml") if isinstance(texts, dict) else None
    if not isinstance(text, str):
        return {}
    model = read_settings(text, where)["model"]
    return {key: model[key] for key in ("activation_function",) if key in model}


def tokenizer_text(tokenizer: TokenizerConfig) -> dict[str, str]:
    """The file of a tokenizer; empty where it is not on this machine."""
    try:
        return {"tokenizer.json": tokenizer.build(offline=True).to_text()}
    except OstroError:
        return {}


def their_config(native: Mapping[str, Any], num_ranks: int) -> dict[str, Any]:
    """nanoGPT's settings for a resolved native configuration on so many processes."""
    trainer, optimizer = native["trainer"], native["optimizer"]
    trackers = trainer["tracker"] if isinstance(trainer["tracker"], list) else [trainer["tracker"]]
    wandb = next((t for t in trackers if t["type"] == "wandb"), None)
    folder = str((native["data"].get("source") or {}).get("dir") or "data/unknown")
    batch, micro = trainer["train_batch_size"], trainer["per_device_parallelism"]
    is_plain = isinstance(batch, int)
    micro = micro if micro and micro > 0 else (batch // num_ranks if is_plain else 1)
    num_steps = trainer["num_train_steps"]
    same = {key: paths[0] for key, paths in settings.SAME.items()} | settings.MODEL
    config = {key: reduce(getitem, path.split("."), native) for key, path in same.items()}
    return config | {
        "out_dir": trainer["checkpointer"]["base_path"].removesuffix("/."),
        "eval_interval": config["eval_interval"] or num_steps,
        "eval_iters": config["eval_iters"] or 200,
        "always_save_checkpoint": trainer["checkpointer"]["save_after_eval"] != "improved",
        "init_from": "scratch",
        "wandb_log": wandb is not None,
        "wandb_project": (wandb or {}).get("project") or settings.NanoGptConfig.wandb_project,
        "wandb_run_name": (wandb or {}).get("name") or settings.NanoGptConfig.wandb_run_name,
        "dataset": folder.rstrip("/").rpartition("/")[2],
        "gradient_accumulation_steps": batch // (micro * num_ranks) if is_plain else 1,
        "batch_size": micro,
        "dropout": native["model"]["resid_pdrop"],
        "max_iters": num_steps,
        "grad_clip": optimizer["max_grad_norm"] or 0.0,
        "decay_lr": optimizer["lr_schedule"].get("type") != "constant",
        "warmup_iters": resolve_steps(optimizer["warmup"], num_steps),
        "lr_decay_iters": optimizer["schedule_steps"] or num_steps,
        "min_lr": optimizer["learning_rate"] * optimizer["min_lr_ratio"],
        "backend": "nccl" if trainer["distributed"]["backend"] == "nccl" else "gloo",
        "device": trainer["device"],
        "dtype": Precision.from_text(trainer["mp"]).compute,
    }
