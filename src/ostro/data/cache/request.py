"""What a token cache is asked for, and whether a finished one is that."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ostro.core.redaction import redacted
from ostro.data.cache.fingerprints import known_files
from ostro.data.cache.store import fits
from ostro.data.sources.files import Shard
from ostro.data.sources.source import SourceConfig
from ostro.data.tokenizer import SpecialTokens, Tokenizer

FORMAT = 1


@dataclass(frozen=True)
class CacheRequest:
    """One split of one source, and how to turn it into tokens."""

    name: str
    """Name for messages and the folder within the cache directory: `train`, `books/train`."""
    source: SourceConfig
    split: str
    tokenizer: Tokenizer
    enforce_eos: bool = True
    special_tokens: SpecialTokens = "text"
    on_bad_record: Literal["error", "skip"] = "error"
    rebuild: bool = False
    num_workers: int | None = None
    ray_address: str | None = None
    """Ray cluster that encodes in place of local workers."""
    must_exist: bool = False
    """Open a finished cache, and build none."""
    verify: bool = False
    """Compare all of a finished cache with its checksums."""

    @property
    def eos_id(self) -> int | None:
        return self.tokenizer.eos_id if self.enforce_eos else None

    @property
    def missing_end(self) -> str | None:
        """Why documents cannot be ended although they should be."""
        if not self.enforce_eos or self.tokenizer.eos_id is not None:
            return None
        return (
            f"{self.name}: data.enforce_eos = true - {self.tokenizer.no_end()}, or"
            " data.enforce_eos: false to let documents follow each other without an end"
        )

    @property
    def dtype(self) -> str:
        return "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"

    def key(self, files: list[list] | None) -> dict[str, Any]:
        """What the cache's content depends on; without the files if they cannot be reached."""
        tokenizer = {"vocab_size": self.tokenizer.vocab_size, "eos_id": self.tokenizer.eos_id,
                     "fingerprint": self.tokenizer.fingerprint}  # fmt: skip
        key = {"format": FORMAT, "source": self.source.settings(self.split),
               "places": redacted(self.source.urls(self.split)), "tokenizer": tokenizer,
               "enforce_eos": self.enforce_eos}  # fmt: skip
        if self._has_special_text:
            key["special_tokens"] = "text"
        return key if files is None else {**key, "files": files}

    @property
    def _has_special_text(self) -> bool:
        """Whether the key notes it; caches without the note were made by parsing, as all once."""
        return self.special_tokens == "text" and bool(self.tokenizer.special_tokens)

    def fits(self, folder: Path, ledger: dict, shards: list[Shard] | None) -> bool:
        """Whether a finished cache is the requested one; False only if it may be rebuilt."""
        bad = ledger["bad_records"] if self.on_bad_record == "error" else 0
        more = [f"on_bad_record: {bad} bad records were left out"] if bad else []
        files = None
        if shards is not None:
            files = known_files(folder, shards, ledger["key"]["files"])
        was, now = dict(ledger["key"]), self.key(files)
        modes = [key.pop("special_tokens", "parse") for key in (was, now)]
        if len(set(modes)) > 1 and was.get("tokenizer") == now["tokenizer"]:
            more.append(self._other_special_tokens())
        return fits(folder, was, now, self.rebuild, more)

    def _other_special_tokens(self) -> str:
        was = "parse" if self._has_special_text else "text"
        note = ", as all caches of earlier versions" if was == "parse" else ""
        return (
            f"special_tokens: built with {was}{note}, the configuration has {self.special_tokens}"
            f" - data.special_tokens: {was} keeps this cache"
        )
