"""Whether speed changed the mathematics: losses of ours against transformers, step by step.

    python -m benchmarks.agreement [--case NAME ...] [--steps 100] [--json FILE] [--a.setting ...]

100 updates from the same weights on the same batches of real text, another one each step, with one
optimizer (AdamW, warm-up of 10 steps, gradients clipped to norm 1): ours as it trains, in bfloat16,
and transformers in float32 and under bfloat16 autocast. To agree is a mean absolute difference of
at most 0.01, and a mean difference over the last 20 steps as small: noise does not add up.

Curves part by chance, too: where a gradient is small because large parts cancel, what rounding left
of it sends a run another way. So every tenth step also compares gradients at the same weights: how
far those of ours and of autocast are from float32's.

The text is the standard library's source in GPT-2's tokens, or bytes where the vocabulary is small;
ids are ranks by frequency, so that any vocabulary can be filled.
"""

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import common
from benchmarks.ours import CASES, build_trainer, load_case
from benchmarks.peers import transformers_models
from benchmarks.train_step import sizes_of
from ostro.data.order.sequences import Batch
from ostro.data.sources.source import StdlibSource
from ostro.data.tokenizer_config import BytesTokenizer, Gpt2Tokenizer
from ostro.lm_config import TrainLmConfig
from ostro.models.hf import to_hf
from ostro.trainer import Trainer

BOUND = 0.01
AUTOCAST = "bf16 autocast"
FLAGS = ("--optimizer.warmup", "10", "--optimizer.decay_mask", "all_2d")
RATES = {"gpt2_124m": "3e-4", "llama_110m": "3e-4", "gpt2_6x384": "6e-4", "gpt2_4x128": "1e-3"}


def batches(config: TrainLmConfig, num_steps: int) -> list[Batch]:
    """One batch a step: windows of the text in random order, none of them twice."""
    assert config.vocab_size is not None
    size, seq_len = config.trainer.batch_plan(1).schedule.size(0), config.model.seq_len
    big = config.vocab_size > 1000
    texts = itertools.islice(_texts(), None if big else 100)
    encoded = (Gpt2Tokenizer() if big else BytesTokenizer()).build().encode_documents(list(texts))
    values, ranks, counts = np.unique(
        np.concatenate(encoded), return_inverse=True, return_counts=True
    )
    by_rank = np.empty(len(values), np.int64)
    by_rank[np.argsort(-counts, kind="stable")] = np.arange(len(values))
    tokens = torch.from_numpy(by_rank[ranks]).clamp(max=config.vocab_size - 1)
    windows = tokens[: len(tokens) // (seq_len + 1) * (seq_len + 1)].view(-1, seq_len + 1)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0))
    chosen = windows[order[: num_steps * size]].view(num_steps, size, seq_len + 1)
    return [Batch(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()) for rows in chosen]


def _texts() -> Iterator[str]:
    source = StdlibSource()
    for shard in source.list_shards("train"):
        yield from (text for text in source.read_shard(shard) if isinstance(text, str))


def train_ours(
    trainer: Trainer, data: Sequence[Batch], look: Callable[[Batch], None] | None = None
) -> list[float]:
    """The loss of each step; `look` is given the batch of every tenth before it."""
    losses = []
    for step, batch in enumerate(data):
        if look is not None and step % 10 == 0:
            look(batch)
        losses.append(trainer.train_step(step, batch)["train/loss"].item())
        trainer.state.step = step + 1
    return losses


def transformers_loss(model: nn.Module, batch: Batch, *, bf16: bool) -> Tensor:
    """The mean loss of a batch."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits: Tensor = model(batch.tokens).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())


def train_theirs(model: nn.Module, trainer: Trainer, data: Sequence[Batch], bf16: bool):
    """The same with transformers' model, in plain torch; `trainer` gives the settings."""
    group = trainer.state.optimizer.param_groups[0]
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": group["weight_decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=group["betas"], eps=group["eps"], fused=True)
    losses = []
    for step, batch in enumerate(data):
        for own in optimizer.param_groups:
            own["lr"] = trainer.schedule(step)
        loss = transformers_loss(model, batch, bf16=bf16)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def load(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Into transformers' model, whose head may be tied."""
    missing = model.load_state_dict(weights, strict=False).missing_keys
    assert set(missing) <= {"lm_head.weight"}, missing


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    """Of all parameters, which keep none."""
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def compare_gradients(trainer: Trainer, model: nn.Module, batch: Batch) -> dict[str, float]:
    """How far those of ours and of autocast are from float32's at the weights of ours, as a part
    of their length."""
    own = trainer.state.model
    load(model, to_hf(own.config, dict(own.named_parameters())))
    scale = 1 / batch.targets.numel()
    ours = to_hf(own.config, gradients(own, own(batch.tokens, batch.targets, scale=scale)))
    exact = gradients(model, transformers_loss(model, batch, bf16=False))
    autocast = gradients(model, transformers_loss(model, batch, bf16=True))
    length = sum(exact[name].square().sum() for name in ours) ** 0.5

    def apart(found: dict[str, Tensor]) -> float:
        return float(sum((found[n] - exact[n]).square().sum() for n in ours) ** 0.5 / length)

    return {"ours": apart(ours), AUTOCAST: apart(autocast)}


def run_case(case: str, num_steps: int, flags: Sequence[str] = ()) -> dict[str, Any]:
    """Losses of all three, and how far they are apart; `flags` change the configuration."""
    rate = ["--optimizer.learning_rate", RATES[case]]
    steps = ["--trainer.num_train_steps", str(num_steps)]
    config = load_case(case, [*FLAGS, *rate, *steps, *flags])
    trainer, data = build_trainer(config), batches(config, num_steps)
    weights = {name: p.detach().clone() for name, p in trainer.state.model.named_parameters()}
    model, found = transformers_models.build(sizes_of(config)), []
    losses = {
        "ours": train_ours(
            trainer, data, lambda batch: found.append(compare_gradients(trainer, model, batch))
        )
    }
    common.note(f"{case}: ours ends at {losses['ours'][-1]:.4f}")
    for name, bf16 in ((AUTOCAST, True), ("float32", False)):
        load(model, to_hf(config.model, weights))
        losses[name] = train_theirs(model, trainer, data, bf16)
        common.note(f"{case}: transformers in {name} ends at {losses[name][-1]:.4f}")
    pairs = [("ours", "float32"), ("ours", AUTOCAST), (AUTOCAST, "float32")]
    apart = {f"{a} - {b}": difference(losses[a], losses[b]) for a, b in pairs}
    return {"losses": losses, "differences": apart, "gradients": found}


def difference(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Mean and largest absolute difference of two curves, and the mean one at their end."""
    found = [a - b for a, b in zip(ours, theirs, strict=True)]
    return {
        "mean_absolute": statistics.fmean(map(abs, found)),
        "largest": max(map(abs, found)),
        "mean_of_last_20": statistics.fmean(found[-20:]),
    }


def measure(
    rounds: int, cases: Sequence[str] = (), num_steps: int = 100, flags: Sequence[str] = ()
) -> dict[str, Any]:
    """Each case once, as nothing here depends on time; all cases, or two where rounds are few."""
    cases = cases or (CASES if rounds >= 5 else ("gpt2_4x128", "gpt2_6x384"))
    return {"cases": {case: run_case(case, num_steps, flags) for case in cases}}


def show(result: dict[str, Any]) -> str:
    """A row for each case and pair, then one of gradients for each case."""
    curves = ["case, losses of", "last losses", "mean absolute difference", "largest",
              "mean of the last 20", "agree"]  # fmt: skip
    rows = []
    for case, found in result["cases"].items():
        for pair, apart in found["differences"].items():
            ends = " and ".join(f"{found['losses'][name][-1]:.4f}" for name in pair.split(" - "))
            agree = max(apart["mean_absolute"], abs(apart["mean_of_last_20"])) <= BOUND
            figures = [f"{apart['mean_absolute']:.4f}", f"{apart['largest']:.4f}",
                       f"{apart['mean_of_last_20']:+.4f}"]  # fmt: skip
            rows.append([f"{case}: {pair}", ends, *figures, "yes" if agree else "**no**"])
    columns = ["ours from float32", "bf16 autocast from float32", "ours is nearer"]
    found_gradients = []
    for case, found in result["cases"].items():
        ours, theirs = ([each[name] for each in found["gradients"]] for name in ("ours", AUTOCAST))
        spreads = [common.figure(common.spread(values), digits=4) for values in (ours, theirs)]
        nearer = sum(a < b for a, b in zip(ours, theirs, strict=True))
        found_gradients.append([case, *spreads, f"{nearer} of {len(ours)}"])
    gradients_table = common.table(["gradients at the same weights", *columns], found_gradients)
    return f"{common.table(curves, rows)}\n\n{gradients_table}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write losses and figures to this file")
    parser.add_argument("--case", nargs="+", choices=CASES, default=())
    parser.add_argument("--rounds", type=int, default=5, help="below 5: two cases only")
    parser.add_argument("--steps", type=int, default=100)
    options, flags = parser.parse_known_args()
    result = measure(options.rounds, options.case, options.steps, flags)
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
