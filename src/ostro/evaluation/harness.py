"""Benchmarks of EleutherAI's lm-evaluation-harness, answered by a model of ours.

Scores equal those of the harness's own `hf` model for the same weights and tokenizer: texts are
encoded and cut as it does. Two things are put right. Where the tokenizer's template appends an end,
`hf` closes each context with it, and scores no first token; ours ask as `hf` does with a template
that appends none. A text without a context stands where documents start in training: behind what
the template begins with, else behind the end of a document; `hf` takes the token that is named
`bos_token`, though the model may never have seen it.

The harness is an optional library (`ostro[eval]`).
"""

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ostro.core.errors import ConfigError, DataError, Problem, did_you_mean
from ostro.data.tokenizer import Tokenizer
from ostro.evaluation import _squad as squad
from ostro.generate.sampling import generate, start_of_text
from ostro.models.lm_model import LmModel, inference

logger = logging.getLogger("ostro.evaluation.harness")

ALIASES = {"superglue": "super-glue-lm-eval-v1"}
"""Names of benchmarks that the harness knows by another one."""

_CHUNK_ELEMENTS = 2**26  # logits held at once, at most
_RESAMPLINGS = 1000  # behind the standard errors of perplexities and F1


def load_benchmarks(names: Sequence[str], task_folder: str | None = None) -> dict[str, list[Any]]:
    """The harness's tasks of each benchmark, with their data sets.

    `task_folder` holds further descriptions of tasks (YAML). `ConfigError` names every unknown
    benchmark, `DataError` the first whose data set cannot be had.
    """
    manager = task_manager(task_folder)
    known = set(manager.all_tasks)
    unknown = [name for name in names if ALIASES.get(name, name) not in known]
    if unknown:
        ask = "`lm-eval ls tasks` lists the names"
        candidates = sorted(known | ALIASES.keys())
        rule = "the harness has no such benchmark"
        raise ConfigError(
            [Problem("--benchmark", rule, did_you_mean(n, candidates) or ask, n) for n in unknown]
        )
    return {name: _tasks(manager, name) for name in names}


@cache
def task_manager(task_folder: str | None) -> Any:
    """The harness's index of tasks; its 14,000 descriptions take ten seconds to read."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise ConfigError("--benchmark needs lm_eval - pip install 'ostro[eval]'") from None
    try:
        import transformers.data.metrics.squad_metrics  # noqa: F401
    except ModuleNotFoundError:  # SuperGLUE needs it
        sys.modules["transformers.data.metrics"] = ModuleType("transformers.data.metrics")
        sys.modules["transformers.data.metrics.squad_metrics"] = squad
    return TaskManager(include_path=task_folder)


def _tasks(manager: Any, name: str) -> list[Any]:
    task = ALIASES.get(name, name)
    try:
        loaded = manager.load([task])
    except Exception as error:  # of the network, the hub, files and scripts: they share no base
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"--benchmark {name} - its task or data set could not be loaded: {reason} - check the"
            " network; without one, copy a filled Hugging Face cache here and name it with HF_HOME,"
            " or describe a local copy in a folder of task files and give it with --task_folder"
        ) from error
    group = loaded["groups"].get(task)
    return [group] if group else list(loaded["tasks"].values())


def run_harness(
    model: LmModel,
    tokenizer: Tokenizer,
    benchmarks: Mapping[str, list[Any]],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    batch_size: int = 16,
) -> dict[str, dict[str, Any]]:
    """Scores of `model`: benchmark -> task -> metric -> value, and versions and examples shown.

    `limit` takes that many questions of each task, `num_fewshot` puts that many solved ones
    before each instead of what the task's description says.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    # Its standard errors would come from forked processes, and a fork of one with torch's and
    # Arrow's threads can wait for ever. The values are the same.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    no_index = TaskManager(include_defaults=False)  # it would read its own for every benchmark
    adapter = _adapter(model, tokenizer, batch_size)
    scores = {}
    for name, tasks in benchmarks.items():
        found = simple_evaluate(
            adapter,
            tasks=tasks,
            task_manager=no_index,
            limit=limit,
            num_fewshot=num_fewshot,
            log_samples=False,
            bootstrap_iters=_RESAMPLINGS,
        )
        scores[name] = {
            "results": {
                task: {key: value for key, value in metrics.items() if "," in key}
                for task, metrics in found["results"].items()
            },
            "versions": found["versions"],
            "num_fewshot": found["n-shot"],
        }
    return scores


def _adapter(model: LmModel, tokenizer: Tokenizer, batch_size: int) -> Any:
    """The model as the harness wants it."""
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    prefix = start_of_text(tokenizer)[-1]
    seq_len = model.config.seq_len

    class Adapter(TemplateLM):
        """The harness encodes context and continuation; the functions below do the rest."""

        @property
        def eot_token_id(self):
            return prefix

        def tok_encode(self, string, add_special_tokens=None, **_):
            return tokenizer.encode_prompt(string, begin=add_special_tokens is not False)

        def _loglikelihood_tokens(self, requests, **_):
            return log_likelihoods(model, [pair for _, *pair in requests], batch_size)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            windows = []
            for request in requests:
                tokens = self.tok_encode(request.args[0])
                parts = get_rolling_token_windows(tokens, prefix, seq_len, context_len=1)
                windows.append([make_disjoint_window(part) for part in parts])
            pairs = [pair for own in windows for pair in own]
            scores = iter(log_likelihoods(model, pairs, batch_size))
            return [sum(next(scores)[0] for _ in own) for own in windows]

        def generate_until(self, requests, disable_tqdm=False):
            return write_until(model, tokenizer, [each.args for each in requests], batch_size)

    return Adapter()


def log_likelihoods(
    model: LmModel, pairs: Sequence[Sequence[list[int]]], batch_size: int
) -> list[tuple[float, bool]]:
    """Of each (context, continuation) the log-probability of the continuation in nats, and whether
    it is what the model would write: the likeliest token every time.

    Too long ones lose the beginning of their context. Pairs that differ in their last token only
    share a pass through the model, as the answers of most multiple-choice questions do.
    """
    from tqdm import tqdm

    seq_len = model.config.seq_len
    asked: dict[tuple[int, ...], list[int]] = {}  # what the model reads -> indices of pairs
    for index, (context, continuation) in enumerate(pairs):
        if not 0 < len(continuation) <= seq_len:
            rule = f"must have at least 1 and at most the model's seq_len = {seq_len}"
            raise DataError(
                f"an answer of {len(continuation)} tokens - {rule} - leave its task out"
            )
        asked.setdefault(tuple((context + continuation)[-seq_len - 1 : -1]), []).append(index)
    reads = sorted(asked, key=len, reverse=True)
    device = next(model.parameters()).device
    found: dict[int, tuple[float, bool]] = {}
    with inference(model), tqdm(total=len(reads), desc="log-likelihoods", disable=None) as bar:
        for start in range(0, len(reads), batch_size):
            batch = reads[start : start + batch_size]
            padded = [[*read, *[0] * (len(batch[0]) - len(read))] for read in batch]
            hidden = model.hidden(torch.tensor(padded, device=device))
            indices = [index for read in batch for index in asked[read]]
            rows = [
                states[len(read) - len(pairs[index][1]) : len(read)]
                for states, read in zip(hidden, batch, strict=True)
                for index in asked[read]
            ]
            targets = [pairs[index][1] for index in indices]
            scores = _scores(torch.cat(rows), model.head_weight(), targets)
            found |= dict(zip(indices, scores, strict=True))
            bar.update(len(batch))
    return [found[index] for index in range(len(pairs))]


def _scores(
    rows: Tensor, weight: Tensor, continuations: Sequence[list[int]]
) -> list[tuple[float, bool]]:
    """Sum of log-probabilities and greediness of each continuation; `rows` are all their states."""
    weight = weight.to(rows.dtype)
    targets = torch.tensor([token for each in continuations for token in each], device=rows.device)
    size = max(1, _CHUNK_ELEMENTS // len(weight))
    losses, greedy = [], []
    for part, wanted in zip(rows.split(size), targets.split(size), strict=True):
        logits = F.linear(part, weight).float()
        losses.append(F.cross_entropy(logits, wanted, reduction="none"))
        greedy.append(logits.argmax(-1) == wanted)
    lengths = [len(each) for each in continuations]
    return [
        (-float(loss.sum()), bool(equal.all()))
        for loss, equal in zip(
            torch.cat(losses).cpu().split(lengths),
            torch.cat(greedy).cpu().split(lengths),
            strict=True,
        )
    ]


def write_until(
    model: LmModel,
    tokenizer: Tokenizer,
    requests: Sequence[tuple[str, dict[str, Any]]],
    batch_size: int,
) -> list[str]:
    """What the model writes after each context, up to the first of the texts it is to stop at.

    Contexts lose their beginning where they would leave no room in `seq_len` for the answer.
    """
    groups: dict[str, list[int]] = {}  # requests with equal settings can share a batch
    for index, (_, settings) in enumerate(requests):
        groups.setdefault(repr(settings), []).append(index)
    texts: dict[int, str] = {}
    for indices in groups.values():
        contexts = [requests[index][0] for index in indices]
        settings = requests[indices[0]][1]
        written = _write_group(model, tokenizer, contexts, settings, batch_size)
        texts |= dict(zip(indices, written, strict=True))
    return [texts[index] for index in range(len(requests))]


def _write_group(
    model: LmModel,
    tokenizer: Tokenizer,
    contexts: list[str],
    settings: dict[str, Any],
    batch_size: int,
) -> list[str]:
    from lm_eval.models.utils import normalize_gen_kwargs
    from tqdm import tqdm

    settings = dict(normalize_gen_kwargs(settings))  # tasks name the same in several ways
    temperature = settings.get("temperature", 1.0) if settings["do_sample"] else 0.0
    seq_len = model.config.seq_len
    num_new, stops = settings["max_gen_toks"], [stop for stop in settings["until"] if stop]
    if num_new >= seq_len:
        logger.warning("answers of %d tokens leave no room in seq_len = %d: half", num_new, seq_len)
        num_new = max(1, seq_len // 2)
    start, room = start_of_text(tokenizer), seq_len - num_new
    prompts = [(tokenizer.encode_prompt(context) or start)[-room:] for context in contexts]
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    texts = [""] * len(prompts)
    with tqdm(total=len(prompts), desc="answers", disable=None) as bar:
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            written = generate(
                model,
                [prompts[index] for index in batch],
                max_new_tokens=num_new,
                temperature=temperature,
                top_k=settings.get("top_k") or None,
                top_p=settings.get("top_p"),
                seed=first,  # a question that is asked again in another batch draws anew
                eos_id=tokenizer.eos_id,
                vocab_size=tokenizer.vocab_size,
                ended=lambda tokens: any(stop in tokenizer.decode(tokens) for stop in stops),
            )
            for index, tokens in zip(batch, written, strict=True):
                texts[index] = tokenizer.decode(tokens)  # without the context, as `hf` does
                for stop in stops:
                    texts[index] = texts[index].split(stop)[0]
            bar.update(len(batch))
    return texts
