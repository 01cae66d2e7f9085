"""The resume contract: what has changed since a checkpoint was saved, and what each change means.

A checkpoint holds the settings of its run (`config.yaml`), which of them were given and not left
at their default (`given`), and under `made_by` what else decides the numbers: the program, the
machine, the tokenizer, the data. `POLICIES` says what becomes of a change.
"""

import hashlib
import logging
import platform
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal

import torch

import ostro
from ostro import kernels
from ostro.config import encode
from ostro.config.fields import join
from ostro.config.nodes import children, value_text
from ostro.core.errors import CheckpointError, Problem, did_you_mean
from ostro.core.redaction import redacted
from ostro.distributed import World

log = logging.getLogger("ostro")

Policy = Literal["accept", "warn", "refuse"]

_SUMS = "sums are taken in another order: losses may differ in the last digits"
_ROUNDING = "numbers are rounded differently from here on"
_ORDER = "the coming batches differ from those that the run would have seen"
_UPDATES = "takes effect from the next step on"
_OTHER_MODEL = "the weights were trained as parts of another model"
_NO_NUMBERS = "changes no loss"
_LENGTH = (
    "the learning-rate schedule is recomputed for the new length; set optimizer.schedule_steps to"
    " keep the old one"
)
_AT_THE_START = "counts when a run starts from scratch"

# By setting or the section it is in; the longest that fits counts.
POLICIES: dict[str, tuple[Policy, str]] = {
    "": ("warn", "may change what is computed from here on"),
    "model": ("refuse", _OTHER_MODEL),
    "model.seq_len": ("warn", _ORDER),
    "model.embed_pdrop": ("warn", _UPDATES),
    "model.resid_pdrop": ("warn", _UPDATES),
    "model.attn_pdrop": ("warn", _UPDATES),
    "model.upcast_attn": ("warn", _ROUNDING),
    "model.gradient_checkpointing": ("accept", "the same values are computed again"),
    "model.initializer_range": ("accept", _AT_THE_START),
    "vocab_size": ("accept", "made_by.vocab_size, the rows in use, is what counts"),
    "optimizer": ("warn", _UPDATES),
    "optimizer.type": ("refuse", "what the checkpoint holds belongs to another optimizer"),
    "data": ("accept", "what counts is made_by.data, the text that is found there"),
    "data.document_mask": ("warn", _UPDATES),
    "data.mixture_block_size": ("warn", _ORDER),
    "data.num_validation_sequences": ("warn", _ORDER),
    "data.sampling": ("warn", _ORDER),
    "data.shuffle": ("warn", _ORDER),
    "data.train_weights": ("warn", _ORDER),
    "data_seed": ("warn", _ORDER),
    "epoch": ("accept", "what counts is trainer.num_train_steps"),
    "sample_prompts": ("accept", _NO_NUMBERS),
    "sampling": ("accept", _NO_NUMBERS),
    "imports": ("warn", "modules of your own may do anything, and are not compared"),
    "trainer": ("accept", _NO_NUMBERS),
    "trainer.seed": ("warn", "the order of the data and dropout go on with another seed"),
    "trainer.num_train_steps": ("warn", _LENGTH),
    "trainer.train_batch_size": ("warn", _ORDER),
    "trainer.crash_on_nan": ("warn", _UPDATES),
    "trainer.skip_steps": ("warn", _UPDATES),
    "trainer.recover": ("warn", _UPDATES),
    "trainer.mp": ("warn", _ROUNDING),
    "trainer.compile": ("warn", _ROUNDING),
    "trainer.deepspeed": ("warn", "DeepSpeed sums and rounds in its own way"),
    **{
        f"trainer.{name}": ("warn", _SUMS)
        for name in (
            "per_device_parallelism",
            "deterministic_reduction",
            "batch_axis",
            "fsdp_axis",
            "tensor_parallel_axes",
            "model_axis_size",
            "context_axis_size",
            "replica_axis_size",
            "axis_resources",
            "parameter_axis_resources",
            "compute_axis_resources",
        )
    },
    "made_by.ostro": ("warn", "another version may compute something else"),
    "made_by.code": ("warn", "ostro's source files differ: they may compute something else"),
    "made_by.python": ("accept", _NO_NUMBERS),
    "made_by.torch": ("warn", _ROUNDING),
    "made_by.device": ("warn", _ROUNDING),
    "made_by.kernels": ("warn", _ROUNDING),
    "made_by.num_threads": ("warn", _SUMS),
    "made_by.num_ranks": ("warn", _SUMS),
    "made_by.vocab_size": ("refuse", "the embedding has a different number of rows"),
    "made_by.tokenizer": ("refuse", "the rows of the embedding stand for other tokens"),
    "made_by.data": ("warn", "the text is not the same as before"),
}

# How this start came about and where it runs; the run itself is the same.
NOT_COMPARED = {
    "trainer.id",
    "trainer.device",
    "trainer.distributed",
    "trainer.resume_policy",
    "trainer.load_checkpoint",
    "trainer.load_checkpoint_path",
    "trainer.initialize_from",
    "initialize_from_hf",
    "use_hf_model_config",
    "trainer.num_threads",
    "trainer.kernels",  # those of made_by are
}


_NO_SETTING = object()
"""The value of a setting that one of two versions does not have."""


@dataclass(frozen=True)
class Change:
    """One difference between a run and the checkpoint that it goes on from."""

    key: str  # dotted path of the setting, or `made_by.` and what else has changed
    what: str  # both values, and where the new one comes from
    policy: Policy  # what is done about it
    why: str  # what the change means

    def __str__(self) -> str:
        return f"{self.key}: {self.what} - {self.policy} - {self.why}"


def record(
    world: World,
    vocab_size: int,
    tokenizer: str,
    data: Mapping[str, str],
    origins: Mapping[str, str],
) -> dict[str, Any]:
    """What a checkpoint notes for `compare`: `made_by` and `given`. The texts are fingerprints."""
    device = world.device
    kind = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    made_by = {
        "ostro": ostro.__version__,
        "code": code_fingerprint(Path(ostro.__file__).parent),
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which a file refuses
        "device": device.type + kind,
        "num_threads": torch.get_num_threads(),
        "kernels": kernels.active_kind(),
        "num_ranks": world.num_ranks,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "data": dict(data),
    }
    given = [path for path, origin in origins.items() if not _is_default(origin)]
    # A configuration made in code has no origins: nobody knows what was given.
    return {"made_by": made_by, "given": given if origins else None}


def code_fingerprint(folder: Path) -> str:
    """Equal for equal Python files in a folder, whatever their time and place."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(f"{path.relative_to(folder).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:32]


def compare(
    config: Any,
    now: Mapping[str, Any],
    saved_config: Mapping[str, Any],
    saved: Mapping[str, Any],
    origins: Mapping[str, str],
) -> list[Change]:
    """Every change, settings first; `now` and `saved` are what `record` returned now and then.

    `saved_config` is plain values, of any version; `config` may be too. A checkpoint without a
    record is compared by its settings alone.
    """
    found = list(_differences(config, redacted(saved_config)))
    if "made_by" in saved and "made_by" in now:
        found += _differences(now["made_by"], saved["made_by"], "made_by")
    if _rows(now) == _rows(saved) is not None:
        # Null, or the number that null came to: the rows in use are the same.
        found = [difference for difference in found if difference[0] != "vocab_size"]
    trainers = [settings.get("trainer", {}) for settings in (encode(config), saved_config)]
    optimizers = [settings.get("optimizer", {}) for settings in (encode(config), saved_config)]
    lengths = [optimizer.get("schedule_steps") for optimizer in optimizers]
    policies = trainers[0].get("resume_policy", {})
    is_deterministic = all(trainer.get("deterministic_reduction") for trainer in trainers)
    changes = []
    for key, was, value in found:
        if any(_is_below(key, other) for other in NOT_COMPARED):
            continue
        policy, why = _policy(key, policies)
        if is_deterministic and why is _SUMS:
            policy, why = "accept", "trainer.deterministic_reduction takes sums in one order"
        if why is _LENGTH and lengths[0] == lengths[1] is not None:
            policy, why = "accept", "optimizer.schedule_steps keeps the learning-rate schedule"
        origin = origins.get(key, "")
        is_default = bool(origin) and _is_default(origin)
        if policy == "refuse" and (value is _NO_SETTING or (was is _NO_SETTING and is_default)):
            policy = "warn"  # nobody chose it, and there is nothing to take back
        given = saved.get("given")
        if is_default and was is not _NO_SETTING and isinstance(given, list) and key not in given:
            origin = "the default has changed"
        what = _what(was, value, origin)
        changes.append(Change(key, what, policy, why))
    return changes


def report(changes: Iterable[Change], where: str, spoken: Callable[[str], str] = str) -> None:
    """Log each change; one `CheckpointError` for all that are refused.

    `spoken`: what the log makes of a line. Several settings that are one there are one line.
    """
    refused, said = [], set()
    for change in changes:
        if change.policy == "refuse":
            refused.append(change)
        elif (difference := spoken(f"{change.key}: {change.what}")) not in said:
            said.add(difference)
            log.log(logging.WARNING if change.policy == "warn" else logging.INFO, "%s", change)
    if refused:
        lines = "\n".join(dict.fromkeys(f"  {change}" for change in refused))
        accepted = ", ".join(f"{change.key}: warn" for change in refused)
        raise CheckpointError(
            f"{where} - was saved by another kind of run:\n{lines}\n"
            "  undo the change, or start anew: another trainer.id, no load_checkpoint_path or\n"
            "  initialize_from; if you mean it, and the shapes still fit, add\n"
            f"  --trainer.resume_policy '{{{accepted}}}'"
        )


def policy_problems(policies: Iterable[str], known: Collection[str]) -> Iterator[Problem]:
    """The keys of `trainer.resume_policy` that are no setting, section or fact."""
    names = [*known, *(key for key in POLICIES if key.startswith("made_by"))]
    sections = {name.rpartition(".")[0] for name in names}
    for key in policies:
        # Below what is no section lie the keys of a mapping, which anybody may name.
        if not any(
            _is_below(name, key) or (_is_below(key, name) and name not in sections)
            for name in names
        ):
            advice = did_you_mean(key, names) or "name a setting, a section, or made_by.x"
            yield Problem(f"trainer.resume_policy.{key}", "is no setting", advice)


def _differences(now: Any, was: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(key, then, now) of every setting that differs; a section of another `type` is one."""
    plain = redacted(encode(now), path.rpartition(".")[2])  # as it was saved
    if isinstance(plain, dict) and isinstance(was, dict):
        if plain.get("type") != was.get("type"):
            yield join(path, "type"), was.get("type"), plain.get("type")
            return
        before, after = was, {str(key): part for key, part in children(now)}
    elif _is_list_of_sections(plain) and _is_list_of_sections(was) and len(plain) == len(was):
        before, after = dict(enumerate(was)), dict(children(now))
    else:
        if repr(plain) != repr(was):  # a warm-up of 1 is a step, of 1.0 the whole cycle
            yield path, was, plain
        return
    absent = _NO_SETTING if is_dataclass(now) else None
    for key in dict.fromkeys([*after, *before]):
        if key in after and key in before:
            yield from _differences(after[key], before[key], join(path, key))
        elif key != "type":
            now_there = encode(after[key]) if key in after else absent
            yield join(path, key), before.get(key, absent), now_there


def _rows(values: Mapping[str, Any]) -> int | None:
    return values.get("made_by", {}).get("vocab_size")


def _is_list_of_sections(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _what(was: Any, now: Any, origin: str) -> str:
    if now is _NO_SETTING:
        return f"was {value_text(was, limit=200)}, and this version has no such setting"
    after = value_text(now, limit=200) + (f" ({origin})" if origin else "")
    if was is _NO_SETTING:
        return f"is new in this version, {after}"
    return f"was {value_text(was, limit=200)}, now {after}"


def _policy(key: str, policies: Mapping[str, Policy]) -> tuple[Policy, str]:
    fits = [prefix for prefix in POLICIES if _is_below(key, prefix)]
    policy, why = POLICIES[max(fits, key=len)]
    own = [prefix for prefix in policies if _is_below(key, prefix)]
    return (policies[max(own, key=len)] if own else policy), why


def _is_below(key: str, prefix: str) -> bool:
    return not prefix or f"{key}.".startswith(f"{prefix}.")


def _is_default(origin: str) -> bool:
    """Whether nobody gave a setting; `; ` parts the keys of another dialect that decide it."""
    return all(part.endswith("default") for part in origin.split("; "))
