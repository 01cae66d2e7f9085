"""`LMDatasetConfig`: the `data` section of a configuration, from sources to training examples."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

from ostro.core.errors import DataError, Problem, at_least
from ostro.core.redaction import Location, redacted
from ostro.data.cache.build import FILES, CacheRequest, Progress, open_cache
from ostro.data.cache.documents import Documents, TokenFiles
from ostro.data.cache.fingerprints import known_files, read_files
from ostro.data.cache.store import LEDGER, CacheDir, TokenStore, fits, write_json
from ostro.data.cache.token_files import open_token_files
from ostro.data.order.mixture import block_counts
from ostro.data.order.permutation import derive_key
from ostro.data.order.sequences import EvalData, TrainData, Windows, cut
from ostro.data.sources.files import BadRecord, Shard, Unreachable
from ostro.data.sources.long_text import LongText
from ostro.data.sources.source import HfSource, SourceConfig, TokensSource, UrlsSource
from ostro.data.tokenizer import SpecialTokens, Tokenizer, tokenizer_from_text
from ostro.data.tokenizer_config import LEARNED, Gpt2Tokenizer, TokenizerConfig

logger = logging.getLogger("ostro.data")

_SINGLE, _TOKENIZER = "data", "tokenizer.json"


@dataclass(frozen=True)
class WeightStage:
    """Mixture weights from a training step on; `[1000, {wiki: 0.5, books: 0.5}]` for short."""

    positional: ClassVar[bool] = True

    start: int
    """First training step of the stage; 0 for the first stage."""
    weights: dict[str, float]
    """Weight of each data set by name; those left out have weight 0."""


@dataclass(frozen=True)
class LMDatasetConfig:
    """Text for a language model: where it comes from, how it is tokenised, cached and ordered.

    Exactly one of `train_urls`, `id`, `source` and `configs` says where the text comes from.
    """

    train_urls: list[Location] = field(default_factory=list)
    """Files to train on: local paths or fsspec URLs; `{1..128}`, `*` and `${NAME}`, an environment
    variable, are expanded."""
    validation_urls: list[Location] = field(default_factory=list)
    """Files to evaluate on; empty for none."""
    id: Location | None = None
    """Hugging Face data set: a name on the hub, or a local repository folder."""
    name: str | None = None
    """Configuration within the Hugging Face data set; null for its default."""
    stream: bool = True
    """Read the Hugging Face data set as needed instead of downloading all of it first."""
    text_key: str = "text"
    """Key (JSON) or column (parquet) that holds the text."""
    format: Literal["auto", "text", "jsonl", "json", "parquet"] = "auto"
    """Format of `train_urls` and `validation_urls`; `auto` goes by the names. A text file is one
    document."""
    source: SourceConfig | None = None
    """Any other single source, for example `stdlib` or `{type: tokens, dir: data/x}`."""
    configs: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name, mixed by `train_weights`."""
    train_weights: dict[str, float] | list[WeightStage] | None = None
    """Weights of `configs`, or a list of stages with their first step; they need not sum to 1. A
    weight of 0 means evaluation only."""
    mixture_block_size: int = 2048
    """Examples in which every source comes with exactly its share."""
    tokenizer: TokenizerConfig = field(default_factory=Gpt2Tokenizer)
    """`gpt2`, `bpe`, `bytes`, `chars`, a Hugging Face name, or the path of a `tokenizer.json`."""
    cache_dir: Location = "cache/"
    """Folder or fsspec URL of the token cache; `${NAME}` is an environment variable."""
    enforce_eos: bool = True
    """End every document with the tokenizer's end-of-document id."""
    special_tokens: SpecialTokens = "text"
    """What documents that spell a special token, such as `<|endoftext|>`, become. `text`: they stay
    text. `parse`: each is read as the token, so that a text can end a document. How many there are
    is logged when a cache is built. Prompts are always parsed."""
    shuffle: bool | int = True
    """true: another permutation every pass; an integer: shuffle within runs of so many windows;
    false: the text's own order."""
    sampling: Literal["permutation", "windows"] = "permutation"
    """`permutation`: every window once a pass. `windows`: windows at random places, with
    replacement, as nanoGPT draws them, in evaluation too; still a function of (seed, index)."""
    evaluate_train: bool = False
    """Also evaluate on the training text, as the set `train`, which counts in no average."""
    document_mask: bool = False
    """Keep attention within documents."""
    num_validation_sequences: int | None = None
    """Hold the last windows of the training text out where a source has no validation files; null
    for none."""
    on_bad_record: Literal["error", "skip"] = "error"
    """What to do with a record that holds no text: stop, or leave it out, count it and list it in
    `quarantine.jsonl` in the cache."""
    rebuild_cache: bool = False
    """Build a cache that does not fit the configuration again instead of stopping."""
    num_workers: int | None = None
    """Processes that tokenise; null uses all cores."""
    tags: list[str] = field(default_factory=list)
    """Labels under which evaluation losses are averaged."""

    def problems(self) -> Iterator[Problem]:
        given = [key for key in ("train_urls", "id", "source", "configs") if getattr(self, key)]
        if len(given) != 1:
            found = f"{' and '.join(given)} are set" if given else "no data is given"
            yield Problem(
                given[-1] if given else "train_urls",
                f"{found}; exactly one of train_urls, id, source and configs says what to train on",
                "for a first try set source: stdlib" if not given else "keep one",
            )
        if self.validation_urls and given and given != ["train_urls"]:
            yield Problem("validation_urls", "goes with train_urls only", "set it in the source")
        if not self.cache_dir.strip():
            yield Problem("cache_dir", "must name a folder or a URL")
        if self.format != "auto" and given and given != ["train_urls"]:
            yield Problem("format", "goes with train_urls only", "set it in the source")
        if not isinstance(self.shuffle, bool) and self.shuffle < 0:
            yield Problem("shuffle", "must be true, false or a number of windows")
        counts = ("num_workers", "num_validation_sequences", "mixture_block_size")
        yield from at_least(1, self, *counts)
        yield from self._weight_problems()

    def _weight_problems(self) -> Iterator[Problem]:
        if not self.configs:
            if self.train_weights is not None:
                yield Problem("train_weights", "goes with configs", "remove it, or name configs")
            return
        if self.train_weights is None and len(self.configs) > 1:
            yield Problem("train_weights", "is missing", "give each of configs a weight")
            return
        stages = self.stages()
        starts = [start for start, _ in stages]
        if not starts or starts[0] != 0 or starts != sorted(set(starts)):
            yield Problem("train_weights", "stages must begin at step 0 and increase")
        for index, (_, weights) in enumerate(stages):
            setting = "train_weights" if len(stages) == 1 else f"train_weights.{index}.weights"
            for name in sorted(set(weights) - set(self.configs)):
                known = ", ".join(self.configs)
                yield Problem(f"{setting}.{name}", "is not in configs", f"known are {known}")
            if any(weight < 0 for weight in weights.values()):
                yield Problem(setting, "must not be negative")
            elif not sum(weights.values()) > 0:
                yield Problem(setting, "must not all be 0")
            elif self.mixture_block_size >= 1:
                for name, count in block_counts(weights, self.mixture_block_size).items():
                    if weights[name] > 0 and count == 0:
                        yield Problem(
                            f"{setting}.{name}",
                            f"is less than one of mixture_block_size = {self.mixture_block_size}",
                            "raise mixture_block_size, or set the weight to 0",
                        )

    def sources(self) -> dict[str, SourceConfig]:
        """All sources by name; a single one is called `data`."""
        if self.configs:
            return dict(self.configs)
        if self.source is not None:
            return {_SINGLE: self.source}
        if self.id is not None:
            text = {"text_key": self.text_key, "stream": self.stream}
            return {_SINGLE: HfSource(self.id, self.name, **text)}
        urls = UrlsSource(self.train_urls, self.validation_urls, self.text_key, self.format)
        return {_SINGLE: urls}

    def stages(self) -> list[tuple[int, dict[str, float]]]:
        """(first step, weights by name) of the mixture; one source has one stage."""
        if self.train_weights is None:
            return [(0, dict.fromkeys(self.sources(), 1.0))]
        if isinstance(self.train_weights, dict):
            return [(0, self.train_weights)]
        return [(stage.start, stage.weights) for stage in self.train_weights]

    def _trained(self) -> list[str]:
        """Names of the sources that are trained on at some step."""
        weights = [weights for _, weights in self.stages()]
        return [name for name in self.sources() if any(w.get(name, 0) > 0 for w in weights)]

    def build_tokenizer(self, *, must_exist: bool = False) -> Tokenizer:
        """Load the tokenizer, or learn it from the training text and keep it in the cache.

        `must_exist`: learn none.
        """
        for name, source in self.sources().items():
            if isinstance(source, TokensSource) and name in self._trained():
                source.list_shards("train")  # what is missing is said before anything is fetched
        if not self.tokenizer.learned:
            return self.tokenizer.build()
        rebuild = self.rebuild_cache and not must_exist
        sources = {name: source for name, source in self.sources().items()
                   if name in self._trained() and not isinstance(source, TokensSource)}  # fmt: skip
        if not sources:
            raise DataError("tokenizer - cannot be learned from token files - name the one that "
                            "made them, or use bytes")  # fmt: skip
        key: dict[str, Any] = {
            "tokenizer": self.tokenizer.settings(),
            "source": {name: source.settings("train") for name, source in sources.items()},
            "places": redacted([source.urls("train") for source in sources.values()]),
        }

        def shards() -> list[tuple[SourceConfig, Shard]]:
            return [(s, shard) for s in sources.values() for shard in s.list_shards("train")]

        def fit(folder: Path, ledger: dict, found: list[tuple[SourceConfig, Shard]] | None) -> bool:
            now, was = dict(key), ledger["key"]
            if found is not None:
                now["files"] = known_files(folder, [shard for _, shard in found], was["files"])
            return fits(folder, was, now, rebuild) and (folder / _TOKENIZER).exists()

        def learn(folder: Path, shards: list[tuple[SourceConfig, Shard]]) -> None:
            logger.info("learning the tokenizer from %d files", len(shards))
            texts = [partial(self._texts, source, shard) for source, shard in shards]
            text = self.tokenizer.learn(texts).to_text()
            (folder / _TOKENIZER).write_text(text, encoding="utf-8")
            files = read_files(folder, [shard for _, shard in shards])
            write_json(folder / LEDGER, {"key": {**key, "files": files}, "stored": [_TOKENIZER]})

        where, shape = CacheDir(self.cache_dir), {"key": {"files": FILES}}
        folder, _ = where.finished(LEARNED, shape, shards, fit, learn, must_exist)
        path = folder / _TOKENIZER
        return tokenizer_from_text(path.read_text("utf-8", "replace"), None, str(path))

    def _texts(self, source: SourceConfig, shard: Shard) -> Iterator[str]:
        for record in source.read_shard(shard):
            if isinstance(record, LongText):
                yield from record.parts()
            elif not isinstance(record, BadRecord):
                yield record
            elif self.on_bad_record == "error":
                raise DataError(f"{record} - mend the record, or set on_bad_record: skip")

    def build(
        self,
        tokenizer: Tokenizer,
        seq_len: int,
        seed: int,
        *,
        progress: Progress | None = None,
        ray_address: str | None = None,
        must_exist: bool = False,
        verify: bool = False,
    ) -> "LMData":
        """Open the token caches, building what is missing, and lay out the examples.

        `seq_len`: tokens in an example. `progress`: called with (name, done, total) while a cache
        is built. `ray_address`: the cluster that tokenises. `must_exist`: build no cache. `verify`:
        compare all of it with its checksums. Raises `DataError` for bad files, records or caches,
        and for too little text.
        """
        requests = {
            "enforce_eos": self.enforce_eos,
            "special_tokens": self.special_tokens,
            "on_bad_record": self.on_bad_record,
            "rebuild": self.rebuild_cache and not must_exist,
            "num_workers": self.num_workers,
            "ray_address": ray_address,
            "must_exist": must_exist,
            "verify": verify,
        }
        return _Builder(self, tokenizer, seq_len, seed, progress, requests).build()


@dataclass(frozen=True)
class LMData:
    """Training and evaluation data of a run."""

    train: TrainData
    validation: dict[str, EvalData]
    """Evaluation sets by name: `validation` for a single source, else the source's name."""
    documents: Mapping[str, Documents]
    """Which documents the tokens of a source's `train` are of, by name."""
    fingerprint: str
    """Equal for equal data in an equal order; recorded in checkpoints."""
    contents: dict[str, str]
    """The same of each split by its folder in the cache, whatever the order."""


class _Builder:
    """Collects the sets of a configuration."""

    def __init__(self, config: LMDatasetConfig, tokenizer: Tokenizer, seq_len: int, seed: int,
                 progress: Progress | None, requests: Mapping[str, Any]):  # fmt: skip
        self._config, self._tokenizer, self._seq_len, self._seed = config, tokenizer, seq_len, seed
        self._progress, self._requests = progress, requests
        self._where = CacheDir(config.cache_dir)
        self._prints: dict[str, str] = {}
        self._files: dict[tuple[str, str], list[list]] = {}  # by source and split
        self._documents: dict[str, Documents] = {}

    def build(self) -> LMData:
        config, trained = self._config, self._config._trained()
        if config.document_mask and self._tokenizer.eos_id is None:
            raise DataError("document_mask = true - the tokenizer has no end-of-document id - set "
                            "document_mask: false or use another tokenizer")  # fmt: skip
        train: dict[str, Windows] = {}
        validation: dict[str, EvalData] = {}
        for name, source in config.sources().items():
            has_validation = self._has_validation(name, source)
            held_out = None if has_validation else config.num_validation_sequences
            if name in trained or held_out:
                windows = self._windows(name, source, "train")
                if held_out:
                    windows, rest = self._hold_out(name, windows, held_out)
                    self._add_eval(validation, name, source, rest)
                if name in trained:
                    train[name] = windows
                    if config.evaluate_train:
                        shown = f"train/{name}" if config.configs else "train"
                        key = self._draw_key(shown)
                        validation[shown] = EvalData(shown, (), windows, held_out=False, key=key)
            if has_validation:
                windows = self._windows(name, source, "validation")
                self._add_eval(validation, name, source, windows)
        self._warn_of_overlap(trained)
        order = [self._seed, config.shuffle, config.sampling, config.stages(), self._seq_len,
                 config.mixture_block_size, config.num_validation_sequences]  # fmt: skip
        prints = [self._tokenizer.fingerprint, *self._prints.values()]
        text = json.dumps([prints, order], sort_keys=True)
        return LMData(
            TrainData(train, self._seed, config.shuffle, config.sampling, tuple(config.stages()),
                      config.mixture_block_size),
            validation,
            self._documents,
            _digest(text),
            {name: _digest(text) for name, text in self._prints.items()},
        )  # fmt: skip

    def _warn_of_overlap(self, trained: list[str]) -> None:
        """Say where a file is trained on and evaluated on, under whatever names."""
        known = {
            print_: file
            for (name, split), files in self._files.items()
            if split == "train" and name in trained
            for file, _, print_ in files
        }
        both = [
            f"{file} (as {known[print_]})" if file != known[print_] else file
            for (_, split), files in self._files.items()
            if split == "validation"
            for file, size, print_ in files
            if size and print_ in known
        ]
        if both:
            more = f" and {len(both) - 3} more" if len(both) > 3 else ""
            logger.warning(
                "validation: %s%s is trained on, too: the loss there does not tell how the model "
                "does on new text - give other files, hold out the last windows with "
                "data.num_validation_sequences, or, to watch the training text, set "
                "data.evaluate_train: true", ", ".join(both[:3]), more,
            )  # fmt: skip

    def _has_validation(self, name: str, source: SourceConfig) -> bool:
        try:
            return source.has_validation()
        except Unreachable:  # then the finished cache tells
            return (self._where.fetch(self._folder(name, "validation")) / LEDGER).exists()

    def _folder(self, name: str, split: str) -> str:
        return f"{name}/{split}" if self._config.configs else split

    def _add_eval(
        self, validation: dict, name: str, source: SourceConfig, windows: Windows
    ) -> None:
        shown = name if self._config.configs else "validation"
        tags = tuple(dict.fromkeys([*source.tags, *self._config.tags]))
        validation[shown] = EvalData(shown, tags, windows, key=self._draw_key(shown))

    def _draw_key(self, name: str) -> int | None:
        """The key of random evaluation windows; None where each comes once."""
        draws = self._config.sampling == "windows"
        return derive_key(self._seed, "evaluate", name) if draws else None

    def _hold_out(self, name: str, windows: Windows, count: int) -> tuple[Windows, Windows]:
        if count >= windows.num_windows:
            raise DataError(
                f"num_validation_sequences = {count} - {name} has only {windows.num_windows} "
                "windows, and some must be left to train on - lower it"
            )
        return windows.split(count)

    def _windows(self, name: str, source: SourceConfig, split: str) -> Windows:
        config = self._config
        folder = self._folder(name, split)
        request = CacheRequest(folder, source, split, self._tokenizer, **self._requests)
        if not source.urls(split):
            raise DataError(f"{folder} - there are no training files - name some, or give the "
                            "data set the weight 0")  # fmt: skip
        if isinstance(source, TokensSource):
            store, documents, files = self._token_files(request, source)
            self._files[name, split] = files
        else:
            cache = open_cache(request, self._where, self._progress)
            self._prints[folder], self._files[name, split] = cache.fingerprint, cache.files
            store, documents = cache.store, cache.documents
        if split == "train":
            self._documents[name] = documents
            if config.shuffle:
                store.expect_random()
        segment_id = self._tokenizer.eos_id if config.document_mask else None
        return cut(store, self._seq_len, folder, segment_id)

    def _token_files(
        self, request: CacheRequest, source: TokensSource
    ) -> tuple[TokenStore, TokenFiles, list[list]]:
        shards = source.list_shards(request.split)
        store, documents, key = open_token_files(
            request.name,
            shards,
            source.dtype,
            self._tokenizer.vocab_size,
            self._tokenizer.eos_id,
            self._where.local / request.name,
            verify=request.verify,
        )
        self._prints[request.name] = json.dumps(key, sort_keys=True)
        files = [[shard.name, *of] for shard, of in zip(shards, key["files"], strict=True)]
        return store, documents, files


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]
