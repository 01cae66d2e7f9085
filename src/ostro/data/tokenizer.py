"""Text to ids and back: tokenizers of the `tokenizers` library, bytes, characters.

A document is encoded whole, with what the tokenizer's template puts around a text, and an
`</s>` that its text spells is text. A prompt takes the template's beginning but not its end, since
the model is to continue it; an `</s>` typed there is the token. What the model writes is decoded
together with the prompt, as many decoders take the space off the first word.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, Literal

import numpy as np
import tokenizers

from ostro.core.errors import DataError
from ostro.data.cuts import never_within
from ostro.data.sources.files import is_unicode
from ostro.data.special_tokens import beginning, candidates, special_tokens, unspellable

END_OF_TEXT = "<|endoftext|>"
SpecialTokens = Literal["text", "parse"]
"""What a document's text that spells a special token becomes: text, or the token."""
_WORDS = r"(?:'(?:[stmd]|re|ve|ll)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s+"
"""Where the library's byte-level pre-tokenizer cuts; in one group tiktoken is a third faster."""
_DESCRIBED = "ostro"  # key of `described` in a saved tokenizer.json
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>", "<eos>", "<|eot_id|>", "<|im_end|>", "[SEP]")


class Tokenizer(ABC):
    """Text to ids and back."""

    vocab_size: int
    eos_id: int | None
    """The id that ends a document; None where the tokenizer has none."""
    fingerprint: str
    """Equal for tokenizers that give equal ids."""
    may_lack_end = False
    """Whether `eos_id` is None by design, rather than for want of knowing."""
    splittable: bool
    """Whether a text may be cut as `cuts` says without a change in the ids."""

    special_tokens: Mapping[str, int] = {}
    """Name and id of each token that stands for no text, but that a text may spell."""
    begin: Sequence[int] = ()
    """The ids that the template puts before a text."""
    described: Mapping[str, Any] = {}
    """What the files beside a Hugging Face tokenizer say of it; see `hf_files`."""

    @abstractmethod
    def encode_documents(
        self, texts: Sequence[str], special_tokens: SpecialTokens = "text"
    ) -> list[np.ndarray]:
        """The ids of each text as unsigned arrays, with what the template puts around it."""

    def encode_prompt(self, text: str, *, begin: bool = True) -> list[int]:
        """The ids of a text that is to be continued, without an end.

        `begin`: with what the template puts before a text, unless the text says so itself.
        """
        if not is_unicode(text):
            shown = text.encode("ascii", "backslashreplace").decode()
            raise DataError(f"prompt = {shown} - is not UTF-8 - convert it first, with iconv")
        return self._encode_prompt(text, begin)

    def _encode_prompt(self, text: str, begin: bool) -> list[int]:
        return self.encode_documents([text])[0].tolist()

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; special tokens are left out."""

    @abstractmethod
    def token_bytes(self) -> np.ndarray:
        """Bytes of text that each id stands for, int64 (vocabulary,); special tokens 0."""

    @abstractmethod
    def to_text(self) -> str:
        """The tokenizer as JSON; `tokenizer_from_text` reads it back."""

    def decode_after(self, context: Sequence[int], ids: Sequence[int]) -> str:
        """The text that `ids` add to that of `context`.

        A character that is not complete at the end becomes one U+FFFD.
        """
        before = self.decode(context)
        for cut in range(min(4, len(ids))):  # a character has four bytes at most
            whole = self.decode([*context, *ids[: len(ids) - cut]])
            if whole.startswith(before) and not whole.endswith("\ufffd"):
                return whole[len(before) :] + "\ufffd" * (cut > 0)
        whole = self.decode([*context, *ids])
        for known in (before, before.rstrip("\ufffd")):
            if whole.startswith(known):
                return whole[len(known) :]
        return self.decode(ids)  # the decoder has changed what stands before

    def no_end(self) -> str:
        """What to say and to advise where `eos_id` is None."""
        return "the tokenizer has no token that ends a document"


class LibraryTokenizer(Tokenizer):
    """A tokenizer of the `tokenizers` library."""

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        eos: str | None = None,
        described: Mapping[str, Any] | None = None,
    ):
        """`eos`: text of the token that ends a document; None looks for the usual names."""
        inner.no_padding()
        inner.no_truncation()
        self.inner = inner
        self.described = described or {}
        self._spec = json.loads(inner.to_str())
        vocab = inner.get_vocab()
        self.vocab_size = max(vocab.values()) + 1
        names = _EOS_NAMES if eos is None else (eos,)
        eos = next((name for name in names if name in vocab), None)
        if eos is None and len(names) == 1:
            raise DataError(
                f"data.tokenizer.eos = {names[0]} - the tokenizer has no such token - "
                f"name one that it has: {candidates(self._spec)}"
            )
        self.eos_id = None if eos is None else vocab[eos]
        text = json.dumps([self._spec, self.eos_id], sort_keys=True)
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]
        self.splittable = self._is_splittable()
        self.special_tokens = special_tokens(self._spec, eos)
        self.begin = beginning(self._spec)

    def _is_splittable(self) -> bool:
        spec, before = self._spec, self._spec["pre_tokenizer"] or {}
        return (
            spec["normalizer"] is None
            and before.get("type") == "ByteLevel"
            and before.get("use_regex", True)
            and not before["add_prefix_space"]
            and not spec["model"].get("dropout")
            and not self.inner.num_special_tokens_to_add(False)
            and never_within(token["content"] for token in spec["added_tokens"])
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

    @cached_property
    def _plain(self) -> tokenizers.Tokenizer:
        """The same tokenizer to which special tokens within a text are text."""
        names = self.special_tokens
        return unspellable(self._spec, names) if names else self.inner

    def encode_documents(
        self, texts: Sequence[str], special_tokens: SpecialTokens = "text"
    ) -> list[np.ndarray]:
        parse = special_tokens == "parse"
        if self._tiktoken is not None:
            allowed = self._tiktoken.special_tokens_set
            if not parse:
                allowed = allowed - self.special_tokens.keys()
            encode = partial(self._tiktoken.encode_to_numpy, allowed_special=allowed)
            with suppress(ValueError):  # a run of a million spaces is too much for it
                return [encode(text, disallowed_special=()) for text in texts]
        inner = self.inner if parse else self._plain
        try:
            encodings = inner.encode_batch_fast(list(texts))
        except Exception as error:  # the library raises plain Exception
            raise self._unknown(inner, texts, error) from error
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _encode_prompt(self, text: str, begin: bool) -> list[int]:
        try:
            ids = self.inner.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # as above
            raise self._unknown(self.inner, [text], error) from error
        return ids if not begin or ids[: len(self.begin)] == self.begin else [*self.begin, *ids]

    def _unknown(
        self, inner: tokenizers.Tokenizer, texts: Sequence[str], error: Exception
    ) -> DataError:
        """The error that names the first word for which the tokenizer has no token."""
        for text in texts:
            if inner.normalizer is not None:
                text = inner.normalizer.normalize_str(text)
            words = [(text, (0, 0))]
            if inner.pre_tokenizer is not None:
                words = inner.pre_tokenizer.pre_tokenize_str(text)
            for word, _ in words:
                try:
                    inner.model.tokenize(word)
                except Exception:
                    shown = word if len(word) <= 50 else f"{word[:50]}..."
                    return DataError(
                        f"data.tokenizer - has no token for {shown!r}, and none for unknown words"
                        " - add an unknown token to the tokenizer (unk_token in its"
                        " tokenizer.json), or use another one, such as bpe or bytes"
                    )
        return DataError(f"data.tokenizer - cannot encode the text: {error} - use another one")

    def no_end(self) -> str:
        return (
            "the tokenizer does not say which token ends a document - set data.tokenizer.eos to"
            f" that token ({candidates(self._spec)})"
        )

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
        if not self.described:
            return self.inner.to_str()
        return json.dumps({**self._spec, _DESCRIBED: self.described}, ensure_ascii=False)


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

    def encode_documents(
        self, texts: Sequence[str], special_tokens: SpecialTokens = "text"
    ) -> list[np.ndarray]:
        return [np.frombuffer(text.encode(), dtype=np.uint8) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(index for index in ids if index < 256).decode(errors="replace")

    def token_bytes(self) -> np.ndarray:
        return np.array([1] * 256 + [0], dtype=np.int64)

    def to_text(self) -> str:
        return '{"type": "bytes"}'


class CharTokenizer(Tokenizer):
    """One id a character of a known alphabet, by its place there."""

    may_lack_end = splittable = True

    def no_end(self) -> str:
        return f"{super().no_end()} - set data.tokenizer.eos: true where its type is chars"

    def __init__(self, alphabet: str, eos: bool):
        self.alphabet = alphabet
        codes = np.frombuffer(alphabet.encode("utf-32-le"), dtype="<u4")
        self._order = np.argsort(codes).astype(np.uint32)
        self._codes = codes[self._order]
        self.eos_id = len(alphabet) if eos else None
        self.vocab_size = len(alphabet) + eos
        text = json.dumps(["chars", alphabet, eos])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:32]

    def encode_documents(
        self, texts: Sequence[str], special_tokens: SpecialTokens = "text"
    ) -> list[np.ndarray]:
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
        described = spec.pop(_DESCRIBED, {})
        inner = tokenizers.Tokenizer.from_str(json.dumps(spec) if described else text)
    except Exception as error:  # the library raises plain Exception
        raise DataError(f"{where} - is no tokenizer: {error}") from error
    eos = None if eos_id is None else inner.id_to_token(eos_id)
    return LibraryTokenizer(inner, eos, described)
