"""Ranks that train one model agree on what they train, or none of them starts.

Two ranks with another learning rate, seed or text would train one model from two configurations
without a word; with another batch size or width they would wait for each other for ever, or abort
in a collective. So each rank describes its run by facts, such as its settings, and all compare a
digest of them in the store they met in: first the settings, before the process group is made, and
then what only shows when data and tokenizer are there. Where digests differ one rank of each kind
tells its facts, rank 0 says what differs, and all ranks end with that error:

    optimizer.learning_rate = 0.01 (--optimizer.learning_rate) - is what rank 1 has; rank 0 has
    0.001 (c.yaml:9) - start all ranks with the same settings
"""

import contextlib
import hashlib
import importlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

import ostro
from ostro.config import leaves, public
from ostro.config.nodes import value_text
from ostro.core.errors import ConfigError, Problem
from ostro.data.text import LMData
from ostro.data.tokenizer import Tokenizer
from ostro.distributed import pick_device
from ostro.distributed.rendezvous import LostRankError, Rendezvous
from ostro.trainer.resume_check import code_fingerprint

MAY_DIFFER = {
    # Which process this is, and how it finds the others.
    "trainer.device",
    "trainer.distributed.coordinator_address",
    "trainer.distributed.local_device_ids",
    "trainer.distributed.num_processes",  # the number itself is compared when they meet
    "trainer.distributed.process_id",
    "trainer.distributed.timeout",
    # Hosts may have folders of their own; the text that is found there is compared.
    "data.cache_dir",
    "data.num_workers",
    "data.rebuild_cache",
    # Only the first rank talks, and writes metrics.
    "trainer.log_dir",
    "trainer.log_file",
    "trainer.log_level",
    "trainer.progress",
    "trainer.tracker",
}
"""Settings, and sections of them, that ranks need not have in common."""

_MOST_LISTED = 10
_MOST_KINDS = 4
_MOST_TEXT = 10_000  # characters of a value that are compared
_MOST_SHOWN = 300
_PATIENCE = timedelta(seconds=5)
_LONG = 5  # lists with more items are compared item by item


@dataclass(frozen=True)
class Fact:
    """One thing that all ranks must have in common."""

    value: str
    """As a message shows it, without credentials."""
    origin: str | None = None
    """Where it comes from."""
    advice: str = "start all ranks with the same settings"
    """What to do where ranks differ in it."""


def agreeing(config: Any, origins: Mapping[str, str]) -> Callable[[Rendezvous], None]:
    """What ranks that have met call to compare all that is known of the run by then."""

    def agree(rendezvous: Rendezvous) -> None:
        facts = _facts_of_settings(config, origins) | _facts_of_programs(config)
        require_agreement(rendezvous, "settings", facts, config.trainer.distributed.timeout)

    return agree


def _facts_of_settings(config: Any, origins: Mapping[str, str]) -> dict[str, Fact]:
    facts = {
        path: Fact(value_text(value, limit=_MOST_TEXT), origins.get(path))
        for path, value in _entries(public(config))
        if not any(f"{path}.".startswith(f"{name}.") for name in MAY_DIFFER)
    }
    if config.trainer.id is None:
        facts["RUN_ID"] = Fact(os.environ.get("RUN_ID", ""), "the environment")
    return facts


def _facts_of_programs(config: Any) -> dict[str, Fact]:
    """The code that is run, a user's own modules among it, torch, and the kind of device."""
    folder, same = Path(ostro.__file__).parent, "install the same version on all hosts"
    version = f"{ostro.__version__} {code_fingerprint(folder)}"
    facts = {"code of ostro": Fact(version, str(folder), same)}
    for name in config.imports:
        path = getattr(importlib.import_module(name), "__file__", None)
        if path is not None:
            digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:32]
            facts[f"code of {name}"] = Fact(digest, path, same)
    facts["torch"] = Fact(str(torch.__version__), str(Path(torch.__file__).parent), same)
    device = config.trainer.device
    facts["kind of device"] = Fact(pick_device(device).type, f"trainer.device = {device}")
    return facts


def facts_of_data(tokenizer: Tokenizer, num_tokens: int, data: LMData) -> dict[str, Fact]:
    """What shows when the text has been tokenised; all but `num_tokens` are fingerprints."""
    advice = "let all ranks read the same files; delete data.cache_dir where it is out of date"
    named = {"tokenizer": tokenizer.fingerprint, "vocabulary": str(num_tokens)}
    named |= {f"text of {name}": content for name, content in data.contents.items()}
    named["order of the data"] = data.fingerprint
    return {name: Fact(value, advice=advice) for name, value in named.items()}


def require_agreement(
    rendezvous: Rendezvous, topic: str, facts: Mapping[str, Fact], timeout: timedelta
) -> None:
    """Return where all ranks have the same facts; else raise the same `ConfigError` on all.

    All ranks call it, with a `topic` of its own. Rank 0 compares digests; facts are exchanged only
    where these differ, by one rank of each kind.
    """
    rank, num_ranks = rendezvous.rank_info.rank or 0, rendezvous.rank_info.num_ranks
    store = rendezvous.open_store(f"agreement/{topic}")
    mine = {name: fact.value for name, fact in facts.items()}
    digests = {r: f"digest/{r}" for r in range(num_ranks)}
    store.set(digests[rank], hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest())
    where = f"the comparison of {topic} at {rendezvous.rank_info.address}"
    if rank == 0:
        rendezvous.wait(store, digests, timeout, where)
        found = [digest.decode() for digest in store.multi_get(list(digests.values()))]
        store.set("kinds", json.dumps(_kinds(found)))
    rendezvous.wait(store, {0: "kinds"}, timeout, where)
    kinds = json.loads(store.get("kinds").decode())
    if len(kinds) == 1:
        return
    facts_at = {kind[0]: f"facts/{kind[0]}" for kind in kinds[:_MOST_KINDS]}
    if rank in facts_at:
        told = {name: asdict(fact) for name, fact in facts.items()}
        store.set(facts_at[rank], json.dumps({"host": socket.gethostname(), "facts": told}))
    if rank == 0:
        rendezvous.wait(store, facts_at, timeout, where)
        reports = [json.loads(text) for text in store.multi_get(list(facts_at.values()))]
        problems = [asdict(problem) for problem in _differences(kinds, reports)]
        store.set("problems", json.dumps(problems))
    rendezvous.wait(store, {0: "problems"}, timeout, where)
    problems = [Problem(**problem) for problem in json.loads(store.get("problems").decode())]
    store.set(f"read/{rank}", "")
    if rank == 0:  # which may keep the store
        with contextlib.suppress(LostRankError):
            rendezvous.wait(store, {r: f"read/{r}" for r in digests}, _PATIENCE, where)
    raise ConfigError(problems)


def _entries(plain: Any) -> Iterator[tuple[str, Any]]:
    """Settings by dotted path; long lists item by item, so that what differs is shown."""
    for path, value in leaves(plain):
        if isinstance(value, list) and len(value) > _LONG:
            yield f"{path}.length", len(value)
            for index, item in enumerate(value):
                yield f"{path}.{index}", item
        else:
            yield path, value


def _kinds(digests: Sequence[str]) -> list[list[int]]:
    """The ranks of each digest: first those that most have, of two as many the lowest rank's."""
    ranks: dict[str, list[int]] = {}
    for rank, digest in enumerate(digests):
        ranks.setdefault(digest, []).append(rank)
    return sorted(ranks.values(), key=lambda alike: (-len(alike), alike[0]))


def _differences(
    kinds: Sequence[Sequence[int]], reports: Sequence[Mapping[str, Any]]
) -> list[Problem]:
    """A problem for each fact of another kind of rank that is not as the first kind has it."""
    problems = []
    usual, host = reports[0]["facts"], reports[0]["host"]
    for ranks, report in zip(kinds[1:], reports[1:], strict=False):
        at = "" if report["host"] == host else f" ({report['host']})"
        names = [
            name
            for name in dict.fromkeys([*report["facts"], *usual])
            if report["facts"].get(name, {}).get("value") != usual.get(name, {}).get("value")
        ]
        types = [name.removesuffix("type") for name in names if name.endswith(".type")]
        for name in names:
            if any(name.startswith(prefix) and name != f"{prefix}type" for prefix in types):
                continue  # of another optimizer all settings are others
            theirs, ours = report["facts"].get(name), usual.get(name)
            rule = f"is what {_list_ranks(ranks)}{at} {_has(ranks)}; {_list_ranks(kinds[0])}"
            rule += f" {_has(kinds[0])} {_shown(ours)}"
            advice = (theirs or ours)["advice"]
            value = "nothing" if theirs is None else _short(theirs["value"])
            origin = None if theirs is None else theirs["origin"]
            problems.append(Problem(name, rule, advice, value, origin))
    if len(problems) > _MOST_LISTED:
        rest = f"and {len(problems) - _MOST_LISTED} more differ"
        problems[_MOST_LISTED - 1 :] = [Problem("...", rest)]
    return problems


def _shown(fact: Mapping[str, str] | None) -> str:
    if fact is None:
        return "nothing"
    return _short(fact["value"]) + (f" ({fact['origin']})" if fact["origin"] else "")


def _short(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


def _has(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"


def _list_ranks(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 1, 2, 5`, `ranks 0, 1, 2 and 13 more`."""
    shown = ", ".join(map(str, ranks[:4]))
    more = f" and {len(ranks) - 4} more" if len(ranks) > 4 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}{more}"
