"""Which documents a batch was made of, and the loss of each.

The batch follows from the configuration, the seed and the token cache; the losses from a
checkpoint. The files that the cache was made from need not be there.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ostro.core.errors import ConfigError, Problem
from ostro.core.units import columns
from ostro.data.cache.documents import Part, TokenFiles
from ostro.data.cache.store import TokenStore
from ostro.data.order.sequences import Batch
from ostro.data.sources.source import TokensSource
from ostro.data.text import LMData
from ostro.data.tokenizer import Tokenizer
from ostro.lm_config import TrainLmConfig
from ostro.models.lm_model import LmModel, inference
from ostro.train_lm import with_epochs
from ostro.trainer.spikes import Recovery

_TOKENS_AT_ONCE = 8192
_EXCERPT_TOKENS, _EXCERPT_CHARS = 32, 40


@dataclass(frozen=True)
class DocumentLoss:
    """What one example of the batch holds of one document."""

    example: int  # place in the batch, from 0
    source: str  # the data set's name; `data` where there is one only
    file: str  # where the document came from; a token file where the documents have no index
    record: int | None  # 1-based line, row or record of the file
    byte: int | None  # bytes before that record in the decompressed file
    token: int  # tokens before this part: in the document, or in the file where there is no record
    num_tokens: int  # tokens of the part
    num_predicted: int  # how many of them had to be predicted: all but the first of a window
    loss: float | None  # their mean loss in nats
    first_words: str  # the beginning of the document
    words: str  # the beginning of the part

    @property
    def rank(self) -> float:
        """Sorts by loss, the largest first: those that are no number, and last those unknown."""
        if self.loss is None:
            return math.inf
        return -math.inf if math.isnan(self.loss) else -self.loss


@dataclass(frozen=True)
class Explanation:
    """A batch, document by document."""

    step: int
    batch_size: int
    seq_len: int
    mean_loss: float | None  # over all predicted tokens
    documents: list[DocumentLoss]  # in the order of the batch
    notes: list[str]  # what cannot be said, and why

    def lines(self, documents: Sequence[DocumentLoss]) -> Iterator[str]:
        """A table of some of the documents."""
        rows = [("loss", "tokens", "example", "byte", "token", "source", "document", "words")]
        for d in documents:
            loss = "-" if d.loss is None else f"{d.loss:.4f}"
            byte = "-" if d.byte is None else str(d.byte)
            place = d.file if d.record is None else f"{d.file}:{d.record}"
            is_begun = d.record is not None and d.token > 0
            words = f"{d.first_words} ... {d.words}" if is_begun else d.first_words
            numbers = (loss, str(d.num_predicted), str(d.example), byte, str(d.token))
            rows.append((*numbers, d.source, place, words))
        yield from columns(rows, right=range(5))


def explain(
    config: TrainLmConfig, data: LMData, tokenizer: Tokenizer, step: int, model: LmModel | None
) -> Explanation:
    """The documents of the batch of update `step`, with their losses if there is a `model`.

    Raises `ConfigError` for a step that the run does not make.
    """
    num_steps = with_epochs(config, data).trainer.num_train_steps
    if not 0 <= step < num_steps:
        rule = f"the run makes updates 0 to {num_steps - 1}"
        raise ConfigError(Problem("--step", rule, "name one of them", str(step)))
    schedule, train = config.trainer.batch_schedule(), data.train
    first, size = schedule.offset(step), schedule.size(step)
    batch = train.get(first, size, schedule)
    losses = None if model is None else batch_losses(model, batch)
    names, found = list(train.sources), []
    numbers, offsets = train.offsets(first, size, schedule)
    for example, (number, offset) in enumerate(zip(numbers, offsets, strict=True)):
        name = names[number]
        windows = train.sources[name]
        start = windows.start + int(offset)
        stop = min(start + windows.seq_len + 1, windows.stop)
        for part in data.documents[name].parts(start, stop):
            target = slice(max(part.start - start - 1, 0), part.stop - start - 1)
            own = None if losses is None else losses[example, target]
            found.append(_describe(example, name, part, own, windows.store, tokenizer, target))
    mean = None if losses is None else float(losses.sum()) / max(int((batch.targets >= 0).sum()), 1)
    notes = [
        f"{name}: its cache in {config.data.cache_dir} was made before documents were indexed, and"
        " their files cannot be named - delete it and run ostro cache: its tokens stay the same"
        for name, source in config.data.sources().items()
        if isinstance(data.documents.get(name), TokenFiles) and not isinstance(source, TokensSource)
    ]
    if Recovery(skip_steps=config.trainer.skip_steps).skips(step):
        notes.append("trainer.skip_steps leaves this batch out: the run makes no update from it")
    return Explanation(step, size, train.seq_len, mean, found, notes)


def _describe(
    example: int,
    source: str,
    part: Part,
    losses: Tensor | None,
    store: TokenStore,
    tokenizer: Tokenizer,
    target: slice,
) -> DocumentLoss:
    num_predicted = target.stop - target.start
    has_loss = losses is not None and num_predicted > 0
    return DocumentLoss(
        *(example, source, part.file, part.record, part.byte, part.token, part.stop - part.start),
        num_predicted,
        float(losses.mean()) if has_loss else None,
        _excerpt(store, tokenizer, part.begin, part.end),
        _excerpt(store, tokenizer, part.start, part.stop),
    )


def _excerpt(store: TokenStore, tokenizer: Tokenizer, start: int, stop: int) -> str:
    """The first words from a token on, on one line that no terminal takes for commands."""
    tokens = store.read(start, min(start + _EXCERPT_TOKENS, stop))
    text = " ".join(tokenizer.decode(tokens.tolist()).strip("\ufffd").split())
    return "".join(c if c.isprintable() else "\ufffd" for c in text[:_EXCERPT_CHARS])


def batch_losses(model: LmModel, batch: Batch) -> Tensor:
    """The loss of each target in nats, (batch, position), 0 where there is none, on the CPU.

    A few examples are computed at once. Without dropout.
    """
    device = next(model.parameters()).device
    size = max(1, _TOKENS_AT_ONCE // batch.tokens.shape[1])
    losses = []
    with inference(model):
        for start in range(0, len(batch.tokens), size):
            part = batch.rows(start, start + size).to(device)
            losses.append(model.token_losses(part.tokens, part.targets, part.segments).cpu())
    return torch.cat(losses).double()


def logged_loss(path: Path, step: int) -> float | None:
    """`train/loss` of a step in a run's `metrics.jsonl`, the last one if it was made again."""
    found = None
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                if '"train/loss"' in line and str(step) in line:
                    with contextlib.suppress(ValueError, KeyError, TypeError):  # a torn line
                        event = json.loads(line)
                        found = event["train/loss"] if event["step"] == step else found
    return found
