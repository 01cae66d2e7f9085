"""What a run would do, from its configuration alone: no data, no network, no weights."""

import math
from collections.abc import Iterator

import torch

from ostro.checkpoint import State, checkpoint_bytes, deletions, disk_bytes
from ostro.config import dump_yaml
from ostro.core.errors import ConfigError, Problem
from ostro.core.units import format_bytes, format_count
from ostro.lm_config import TrainLmConfig
from ostro.models.lm_model import LmModel
from ostro.nn import axes_of
from ostro.optim import Schedule, optimizer_tensors
from ostro.parallel.plan import ParameterPlan, plan_sharding, table
from ostro.trainer.spikes import Recovery


def describe(config: TrainLmConfig, num_devices: int = 1) -> Iterator[str]:
    """Lines that say how the batches are cut, how large everything is, and how the LR runs."""
    plan = config.trainer.batch_plan(num_devices)
    num_steps, seq_len = config.trainer.num_train_steps, config.model.seq_len
    for start, size in plan.schedule.stages:
        micro, num_micro = plan.micro_batch_size(start), plan.num_micro_batches(start)
        at = f" from step {start}" if len(plan.schedule.stages) > 1 else ""
        yield (
            f"batch{at}: {size} examples of {seq_len} tokens = {num_micro} micro-batches"
            f" x {micro} examples x {plan.data_axis_size} devices"
        )
    yield f"evaluation batch: {plan.eval_batch_size} examples"
    recovery = Recovery(skip_steps=config.trainer.skip_steps)
    num_examples = recovery.num_examples(plan.schedule, num_steps)
    tokens = num_examples * seq_len
    yield f"steps: {num_steps}"
    yield f"tokens to be seen: {tokens} ({format_count(tokens)})"
    num_tokens = num_tokens_of(config)
    model = _model(config, num_tokens)
    own = sum(p.local_size for p in _plans(config, model, num_devices).values())
    parameters = dict(model.named_parameters())
    count = sum(p.numel() for p in parameters.values())
    yield f"vocabulary: {num_tokens}"
    yield f"parameters: {count} ({format_count(count)})"
    if num_devices > 1:
        yield f"parameters on each device: {own} ({format_count(own)})"
    flops = 3 * config.model.flops_per_token(num_tokens) * tokens
    yield f"operations: {flops:.3g}"
    axes = axes_of(model)
    optimizer = config.optimizer.build({name: (p, axes[name]) for name, p in parameters.items()})
    tensors = {
        "model": parameters,
        "optimizer": optimizer_tensors(optimizer, parameters),
        "state": {"random.torch": torch.get_rng_state()},
    }
    tokenizer = " " * config.data.tokenizer.saved_bytes(config.data.cache_dir)
    texts = {"config.yaml": dump_yaml(config), "tokenizer.json": tokenizer}
    size = checkpoint_bytes(State(tensors, texts=texts))
    yield f"checkpoint size: {size} bytes ({format_bytes(size)})"
    checkpointer = config.trainer.checkpointer
    kept, needed = disk_bytes(checkpointer, num_steps, size)
    yield (
        f"disk for checkpoints: {needed} bytes ({format_bytes(needed)}):"
        f" {kept} permanent and the one being written"
    )
    planned = list(deletions(checkpointer, num_steps, size))
    for step, deleted in planned[:5]:
        names = ", ".join(map(str, deleted))
        yield f"keep_bytes: before step {step} is saved, the checkpoint of {names} is deleted"
    if more := sum(len(deleted) for _, deleted in planned[5:]):
        yield f"keep_bytes: {more} more are deleted later, so that the rest lies evenly"
    schedule = config.optimizer.schedule(num_steps)
    for warning in schedule.warnings:
        yield f"warning: {warning}"
    yield "learning rate:"
    yield from draw(schedule, num_steps)


def describe_sharding(config: TrainLmConfig, num_devices: int) -> Iterator[str]:
    """Lines that say how the devices are laid out and where each parameter lies."""
    trainer, model = config.trainer, _model(config, num_tokens_of(config))
    plans = _plans(config, model, num_devices)
    for warning in trainer.axis_mapping().warnings:
        yield f"warning: {warning}"
    yield f"mesh of {num_devices} devices: {trainer.mesh_sizes(num_devices)}"
    yield from table(plans, getattr(torch, trainer.mp.params).itemsize)


def _model(config: TrainLmConfig, num_tokens: int) -> LmModel:
    """The model without its weights."""
    with torch.device("meta"):
        model = config.model.build(num_tokens)
    model.to(getattr(torch, config.trainer.mp.params))
    return model


def _plans(config: TrainLmConfig, model: LmModel, num_devices: int) -> dict[str, ParameterPlan]:
    axes, trainer = axes_of(model), config.trainer
    parameters = {name: (tuple(p.shape), axes[name]) for name, p in model.named_parameters()}
    return plan_sharding(parameters, trainer.axis_mapping(), trainer.mesh_sizes(num_devices))


def num_tokens_of(config: TrainLmConfig) -> int:
    """Rows of the embedding, without reading data."""
    num_tokens = config.vocab_size
    num_tokens = num_tokens or config.data.tokenizer.known_vocab_size(config.data.cache_dir)
    if num_tokens is None:
        rule = "this tokenizer's size is known only once it is built"
        advice = "set vocab_size, or build it first with `ostro cache`"
        raise ConfigError(Problem("vocab_size", rule, advice, value="null"))
    return num_tokens


def draw(schedule: Schedule, num_steps: int, width: int = 64, height: int = 8) -> list[str]:
    """The learning rate over the run, as lines of text."""
    width = min(width, num_steps)
    steps = [round(i * (num_steps - 1) / max(width - 1, 1)) for i in range(width)]
    rates = [schedule(step) for step in steps]
    peak = max(rates) or 1.0
    blocks = " ▁▂▃▄▅▆▇█"
    lines = []
    for row in range(height - 1, -1, -1):
        fills = [min(max(rate / peak * height - row, 0.0), 1.0) for rate in rates]
        bars = "".join(blocks[math.ceil(fill * 8)] for fill in fills)
        label = f"{peak * (row + 1) / height:9.2e}" if row in (height - 1, 0) else " " * 9
        lines.append(f"{label} |{bars}")
    last = str(num_steps - 1)
    lines.append(" " * 9 + " +" + "-" * width)
    lines.append(" " * 11 + "0" + last.rjust(width - 1))
    return lines
