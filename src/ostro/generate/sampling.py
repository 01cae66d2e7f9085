"""Text from a trained model: tokens are drawn one by one, with a key-value cache."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ostro.core.errors import Problem, seed_problems
from ostro.data.tokenizer import Tokenizer
from ostro.generate.cpu_decoder import decoder_of, in_compute_dtype
from ostro.kernels.decoder import Decoder
from ostro.models.lm_model import LmModel, inference
from ostro.nn import KeyValueCache
from ostro.runtime.phase import enter_phase


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen."""

    max_new_tokens: int = 100
    """Tokens to write after each prompt, at most; writing ends earlier at the end of a document."""
    temperature: float = 0.8
    """Logits are divided by this: below 1 likelier tokens win more often. 0 always takes the
    likeliest."""
    top_k: int | None = None
    """Choose among this many of the likeliest tokens. Null: all."""
    top_p: float | None = None
    """Choose among the likeliest tokens whose probabilities add up to this. Null: all."""
    seed: int = 0
    """Seed of the draws. Prompt i uses a generator of its own, seeded with this + i."""

    def problems(self) -> Iterator[Problem]:
        """Values that cannot be sampled with."""
        yield from seed_problems(self, "seed")
        if self.max_new_tokens < 1:
            yield Problem("max_new_tokens", "must be positive")
        if not 0 <= self.temperature < float("inf"):
            yield Problem("temperature", "must be 0 or a positive number")
        if self.top_k is not None and self.top_k < 1:
            yield Problem("top_k", "must be positive", "null takes all tokens")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            yield Problem("top_p", "must be above 0 and at most 1", "null takes all tokens")


def complete_all(
    model: LmModel,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: SamplingConfig,
    poll: Callable[[], object] = lambda: None,
) -> list[str]:
    """Each prompt and what the model writes after it, in one batch.

    An empty prompt stands for the start of a document. `poll` is called before every token and
    may raise to stop.
    """
    contexts = [tokenizer.encode_prompt(prompt) or start_of_text(tokenizer) for prompt in prompts]
    written = generate(
        model,
        contexts,
        eos_id=tokenizer.eos_id,
        vocab_size=tokenizer.vocab_size,
        poll=poll,
        **vars(config),
    )
    return [
        prompt + _text_after(tokenizer, prompt, context, tokens)
        for prompt, context, tokens in zip(prompts, contexts, written, strict=True)
    ]


def start_of_text(tokenizer: Tokenizer) -> list[int]:
    """What a model has before it at the start of a document, where there is no text."""
    if begin := tokenizer.encode_prompt(""):
        return begin
    if tokenizer.eos_id is not None:
        return [tokenizer.eos_id]
    return tokenizer.encode_prompt("\n")


def _text_after(tokenizer: Tokenizer, prompt: str, context: list[int], tokens: list[int]) -> str:
    text = tokenizer.decode_after(context, tokens)
    if prompt[-1:].isspace() and not tokenizer.decode(context)[-1:].isspace():
        return text.lstrip()  # the tokenizer knows no space at the end: one comes with each word
    return text


@torch.inference_mode()
def generate(
    model: LmModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos_id: int | None = None,
    vocab_size: int | None = None,
    ended: Callable[[Sequence[int]], bool] | None = None,
    poll: Callable[[], object] = lambda: None,
) -> list[list[int]]:
    """The tokens that follow each prompt, without the prompt and without `eos_id`.

    Prompts are lists of at least one token id, of any lengths; a row neither sees nor influences
    the others, and row i draws from a generator seeded with `seed + i`. Writing goes on past the
    model's `seq_len`: when a row's context is full it is cut to its last `seq_len / 2` tokens and
    computed anew. Ids of `vocab_size` and above (padding of the head) are never chosen. A row
    also ends when `ended` says so of the tokens it has written. Dropout is off meanwhile. Waits for
    the device at every token, and calls `poll` before it.
    """
    assert all(prompts), "a prompt has at least one token"
    generators = [
        torch.Generator().manual_seed((seed + row) % (1 << 64)) for row in range(len(prompts))
    ]
    device = next(model.parameters()).device
    with inference(model), in_compute_dtype(model):
        rows = _Rows(model, prompts, max_new_tokens, eos_id, ended)
        for _ in range(max_new_tokens):
            if not any(rows.active):
                break
            enter_phase("sample")
            poll()
            logits = rows.next_logits(device)[:, :vocab_size]
            uniform = torch.stack([torch.rand((), generator=each) for each in generators])
            drawn = choose(logits, uniform.to(device), temperature, top_k, top_p)
            rows.extend(drawn.tolist())  # waits for the device
    return rows.written


class _Rows:
    """Contexts of all prompts, and the cache of what the model has seen of them."""

    def __init__(self, model, prompts, max_new_tokens, eos_id, ended):
        self.model, self.eos_id, self.ended = model, eos_id, ended
        self.seq_len = model.config.seq_len
        self.contexts = [list(prompt[-self.seq_len :]) for prompt in prompts]
        self.written: list[list[int]] = [[] for _ in prompts]
        self.active = [True] * len(prompts)
        self.capacity = min(self.seq_len, max(map(len, self.contexts), default=0) + max_new_tokens)
        self.cache: KeyValueCache | None = None
        self.decoder: Decoder | None = None

    def next_logits(self, device: torch.device) -> Tensor:
        """Logits of the token after each context, (batch, vocab)."""
        for context in self.contexts:
            if len(context) > self.seq_len:
                del context[: -max(1, self.seq_len // 2)]
                self.cache = None
        if self.cache is None:
            self.cache, self.decoder = KeyValueCache(len(self.contexts), self.capacity), None
            new, counts = self.contexts, [len(context) for context in self.contexts]
        else:  # a row that has ended repeats its last token, which counts for nothing
            self.decoder = self.decoder or decoder_of(self.model, self.cache, len(self.contexts))
            new, counts = [context[-1:] for context in self.contexts], list(map(int, self.active))
        longest = max(map(len, new))
        padded = [tokens + [0] * (longest - len(tokens)) for tokens in new]
        self.cache.append(counts)
        tokens = torch.tensor(padded, device=device)
        if self.decoder is None:
            return self.model(tokens, cache=self.cache)[:, 0]
        positions = self.cache.positions(1, device)
        embedded = self.model.embed(tokens, positions)[:, 0].float()
        return self.decoder.step(embedded, positions[:, 0].contiguous())

    def extend(self, drawn: list[int]) -> None:
        """Add each row's token, unless the row has ended or the token ends it."""
        for row, token in enumerate(drawn):
            self.active[row] = self.active[row] and token != self.eos_id
            if self.active[row]:
                self.contexts[row].append(token)
                self.written[row].append(token)
                self.active[row] = self.ended is None or not self.ended(self.written[row])


def choose(
    logits: Tensor,
    uniform: Tensor,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> Tensor:
    """One token for each row of logits (batch, vocab), by inverting the cumulative distribution.

    `uniform` (batch,) in [0, 1) decides. `top_k` cuts first, then `top_p` of what is left.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        logits, order = logits.topk(min(top_k, logits.shape[-1]))
    elif top_p is not None:
        logits, order = logits.sort(descending=True)
    else:
        order = torch.arange(logits.shape[-1], device=logits.device).expand(logits.shape)
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    index = torch.searchsorted(cumulative, uniform[:, None] * total, right=True)
    last = (cumulative < total).sum(-1, keepdim=True)  # rounding must not lead past it
    return order.gather(1, index.minimum(last)).squeeze(1)
