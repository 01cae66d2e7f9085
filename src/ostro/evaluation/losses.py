"""Loss, perplexity and bits per byte over validation sets.

Averages are taken over tokens, not over batches: the loss of a set is the sum of its tokens'
losses over their number, and its bits per byte is its total bits over its total bytes, whatever
the batch size. Sets carry tags; `wiki/en` also counts towards `wiki`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ostro.data.order.sequences import EvalData
from ostro.distributed import World
from ostro.models.lm_model import LmModel, inference
from ostro.runtime.phase import enter_phase


@dataclass
class Totals:
    """Sums over the predicted tokens of one or more sets."""

    loss: float = 0.0
    """Sum of the tokens' losses, in nats."""
    num_tokens: int = 0
    """How many tokens were predicted."""
    num_bytes: int = 0
    """How many bytes of text those tokens stand for; special tokens stand for none."""

    def add(self, other: "Totals") -> None:
        """Add the sums of another set."""
        self.loss += other.loss
        self.num_tokens += other.num_tokens
        self.num_bytes += other.num_bytes

    def shared(self, world: World) -> "Totals":
        """The sums over all ranks."""
        if world.num_ranks == 1:
            return self
        mine = torch.tensor([self.loss, self.num_tokens, self.num_bytes], dtype=torch.float64)
        loss, num_tokens, num_bytes = world.sum(mine).tolist()
        return Totals(loss, int(num_tokens), int(num_bytes))

    @property
    def mean_loss(self) -> float:
        """Nats per token; NaN for no tokens."""
        return self.loss / self.num_tokens if self.num_tokens else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Total bits over total bytes; NaN for no bytes."""
        return self.loss / math.log(2) / self.num_bytes if self.num_bytes else math.nan

    def metrics(self, prefix: str) -> dict[str, float]:
        """`<prefix>/loss`, `/perplexity` and `/bpb`."""
        loss = self.mean_loss
        perplexity = math.exp(loss) if loss < 700 else math.inf if loss == loss else math.nan
        metrics = {f"{prefix}/loss": loss, f"{prefix}/perplexity": perplexity}
        if self.num_bytes:
            metrics[f"{prefix}/bpb"] = self.bits_per_byte
        return metrics


def evaluate(
    model: LmModel,
    sets: Mapping[str, EvalData],
    *,
    batch_size: int,
    token_bytes: np.ndarray,
    world: World,
    max_batches: int | None = None,
    poll: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Metrics of `model` over `sets`, dropout off, the model's mode restored.

    Every rank computes its share of each batch of `batch_size` and gets all metrics.
    `max_batches` counts per set. `poll` is called between batches and may raise to stop.
    """
    bytes_of = torch.as_tensor(token_bytes)
    totals: dict[str, Totals] = {}
    with inference(model):
        for name, data in sets.items():
            total, losses = Totals(), []
            ranks = {"rank": world.data_rank, "num_ranks": world.num_data_ranks}
            for batch in data.batches(batch_size, max_batches, **ranks):
                enter_phase("evaluation")
                poll()
                predicted = batch.targets[batch.targets >= 0]
                if world.context_rank == 0:  # the others see the same tokens
                    total.num_tokens += predicted.numel()
                    total.num_bytes += int(bytes_of[predicted].sum())
                batch = batch.to(world.device)
                losses.append(model(batch.tokens, batch.targets, segments=batch.segments))
            if losses:
                total.loss = sum(torch.stack(losses).tolist())  # waits for the device, once a set
            totals[name] = total.shared(world)
    held_out = {name: total for name, total in totals.items() if sets[name].held_out}
    metrics = summarize(held_out, {name: list(sets[name].tags) for name in held_out})
    for name in totals.keys() - held_out.keys():
        metrics |= totals[name].metrics(f"eval/{name}")
    return metrics


def summarize(totals: Mapping[str, Totals], tags: Mapping[str, list[str]]) -> dict[str, float]:
    """Metrics of each set, of each tag, and of everything.

    `eval/loss` weighs every token alike. With several sets, `eval/macro_loss` weighs every tag
    alike, and so does `eval/<tag>/macro_loss` for the sets below a tag.
    """
    everything = Totals()
    tagged: dict[str, list[Totals]] = {}
    for name, total in totals.items():
        everything.add(total)
        own_tags = (name, *tags.get(name, ()))
        for tag in {part for own in own_tags for part in _with_parents(own)}:
            tagged.setdefault(tag, []).append(total)
    metrics = everything.metrics("eval")
    if len(totals) < 2:
        return metrics
    for tag in sorted(tagged):
        together = Totals()
        for total in tagged[tag]:
            together.add(total)
        metrics |= together.metrics(f"eval/{tag}")
        if len(tagged[tag]) > 1:
            metrics |= _macro(f"eval/{tag}", tagged[tag])
    return metrics | _macro("eval", list(totals.values()))


def _with_parents(tag: str) -> Iterator[str]:
    parts = tag.split("/")
    for end in range(1, len(parts) + 1):
        yield "/".join(parts[:end])


def _macro(prefix: str, totals: list[Totals]) -> dict[str, float]:
    totals = [total for total in totals if total.num_tokens]
    if not totals:
        return {}
    macro = {f"{prefix}/macro_loss": sum(total.mean_loss for total in totals) / len(totals)}
    if all(total.num_bytes for total in totals):
        bits = [total.bits_per_byte for total in totals]
        macro[f"{prefix}/macro_bpb"] = sum(bits) / len(bits)
    return macro
