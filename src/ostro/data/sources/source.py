"""Where documents come from: files, a Hugging Face data set, the standard library, token files.

A source lists its shards (files, mostly) for a split and reads one shard's documents in order.
That is all the token cache needs to build in parallel and to go on after a kill.
"""

import hashlib
import io
import os
import sysconfig
import tokenize
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ostro.config import Choice
from ostro.core.errors import DataError, Problem
from ostro.core.redaction import Location, local_path
from ostro.data.cache.identity import whole_hash
from ostro.data.sources import files
from ostro.data.sources.files import BadRecord, Shard, Unreachable
from ostro.data.sources.reading import Records, read_file, text_of

SPLITS = ("train", "validation")
_STDLIB = Path(sysconfig.get_path("stdlib"))
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class SourceConfig(Choice):
    """A registry of sources of documents; `type` picks one, files by URL when there is none."""

    default_type = "urls"

    tags: list[str]

    @classmethod
    def implied_type(cls, keys: Collection[str]) -> str | None:
        """A source with an `id` is a Hugging Face data set, as in the `data` section itself."""
        return "hf" if "id" in keys else None

    def list_shards(self, split: str) -> list[Shard]:
        """The shards of `train` or `validation` in their order; empty when there is no such split.

        Raises `Unreachable`, naming all that is missing.
        """
        raise NotImplementedError

    def read_shard(self, shard: Shard) -> Iterator[str | BadRecord] | Records:
        """The shard's documents in order.

        A generator may return the fingerprint of what it read; else the shard's files are read once
        more for it.
        """
        raise NotImplementedError

    def settings(self, split: str) -> dict[str, Any]:
        """What the documents depend on beside the files' content; recorded in the cache."""
        return {}

    def urls(self, split: str) -> list[str]:
        """Where the files are said to be: what is compared while they cannot be reached."""
        raise NotImplementedError

    def has_validation(self) -> bool:
        """Whether there are documents for validation."""
        return bool(self.urls("validation"))


@SourceConfig.register_subclass("urls")
@dataclass(frozen=True)
class UrlsSource(SourceConfig):
    """Files by path or URL: text, JSON lines, JSON or parquet, plain or compressed."""

    train_urls: list[Location] = field(default_factory=list)
    """Files to train on: local paths or fsspec URLs; `{1..128}` and `*` are expanded."""
    validation_urls: list[Location] = field(default_factory=list)
    """Files to evaluate on; empty for none."""
    text_key: str = "text"
    """Key (JSON) or column (parquet) that holds the text."""
    format: Literal["auto", "text", "jsonl", "json", "parquet"] = "auto"
    """Format of the files; `auto` goes by the names. A text file is one document."""
    tags: list[str] = field(default_factory=list)
    """Labels under which evaluation losses are averaged."""

    def problems(self) -> Iterator[Problem]:
        if not self.train_urls and not self.validation_urls:
            yield Problem("train_urls", "names no file", "list at least one path or URL")

    def urls(self, split: str) -> list[str]:
        return self.train_urls if split == "train" else self.validation_urls

    def list_shards(self, split: str) -> list[Shard]:
        return files.list_files(self.urls(split), f"{split}_urls", self.format)

    def read_shard(self, shard: Shard) -> Records:
        return read_file(shard.name, shard.format, self.text_key)

    def settings(self, split: str) -> dict[str, Any]:
        return {"text_key": self.text_key, "format": self.format}


@SourceConfig.register_subclass("stdlib")
@dataclass(frozen=True)
class StdlibSource(SourceConfig):
    """The running Python's own standard library: about 12 MB of source that is always there.

    Test folders are left out. About one file in fifty, chosen by a hash of its name, is held out
    for validation.
    """

    tags: list[str] = field(default_factory=list)
    """Labels under which evaluation losses are averaged."""

    def list_shards(self, split: str) -> list[Shard]:
        found: list[Path] = []
        for folder, subfolders, names in os.walk(_STDLIB):
            subfolders[:] = [name for name in subfolders if name not in _LEFT_OUT]
            found += (Path(folder, name) for name in names if name.endswith(".py"))
        shards = []
        for name in sorted(path.relative_to(_STDLIB).as_posix() for path in found):
            held_out = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) % 50 == 0
            if held_out == (split == "validation"):
                shard = files.make_shard(str(_STDLIB / name), "text")
                shards.append(shard._replace(name=name))
        if not shards:
            raise Unreachable(f"stdlib - {_STDLIB} holds no .py files - use another source")
        return shards

    def read_shard(self, shard: Shard) -> Records:
        path = _STDLIB / shard.name
        try:
            data = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} - cannot be read: {error.strerror}") from error
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(data).readline)
            yield data.decode(encoding)
        except (SyntaxError, UnicodeDecodeError) as error:
            yield BadRecord(shard.name, "line 1", f"cannot be decoded ({error})")
        return whole_hash(io.BytesIO(data), len(data))

    def urls(self, split: str) -> list[str]:
        return ["stdlib"]


@SourceConfig.register_subclass("hf")
@dataclass(frozen=True)
class HfSource(SourceConfig):
    """A data set of the Hugging Face hub, or a local folder laid out like one."""

    id: Location = ""
    """Name on the hub (`wikitext`) or path of a local repository folder."""
    name: str | None = None
    """Configuration within the data set; null for its default."""
    splits: list[str] = field(default_factory=lambda: ["train", "validation"])
    """The data set's names for the training and the validation split; the second may be absent."""
    text_key: str = "text"
    """Column that holds the text."""
    stream: bool = True
    """Read over the network as needed instead of downloading the whole data set first."""
    tags: list[str] = field(default_factory=list)
    """Labels under which evaluation losses are averaged."""

    def problems(self) -> Iterator[Problem]:
        if not self.id:
            yield Problem("id", "is missing", "name a data set of the hub or a local folder")
        if not 1 <= len(self.splits) <= 2:
            yield Problem("splits", "must name the training and, if any, the validation split")

    def _builder(self) -> Any:
        try:
            import datasets
        except ImportError as error:
            raise DataError(
                f'id = {self.id} - needs the datasets library - pip install "ostro[hf]"'
            ) from error
        path = os.path.expanduser(local_path(self.id))
        datasets.disable_progress_bars()
        try:
            known = path if os.path.isdir(path) else self.id
            return datasets.load_dataset_builder(known, self.name)
        except Exception as error:  # the library raises a dozen unrelated classes here
            raise Unreachable(
                f"id = {self.id} - the data set cannot be opened: {error} - check the name and the "
                "network, or give a local folder with its files"
            ) from error

    def _split(self, split: str) -> str | None:
        return dict(zip(SPLITS, self.splits, strict=False)).get(split)

    def list_shards(self, split: str) -> list[Shard]:
        builder, name = self._builder(), self._split(split)
        listed = builder.config.data_files or {}
        known = list(listed) or list(builder.info.splits or {})
        if name is None or (known and name not in known):
            if split == "validation":
                return []
            raise DataError(
                f"splits - {self.id} has no split {name!r}, only {', '.join(known)} - set "
                "splits: [training split, validation split]"
            )
        local = [str(path) for path in listed.get(name, []) if os.path.isfile(str(path))]
        shown = f"{self.id}:{name}"
        if not local or len(local) != len(listed[name]):
            return [Shard(shown, 0, str(builder.hash or builder.config_id), name)]
        parts = [files.make_shard(path, "hf") for path in local]
        size, of_parts = sum(part.size for part in parts), tuple(part.files[0] for part in parts)
        return [Shard(shown, size, "", name, of_parts, is_set=True)]

    def read_shard(self, shard: Shard) -> Iterator[str | BadRecord]:
        builder, row = self._builder(), 0
        try:
            if self.stream:
                rows = builder.as_streaming_dataset(split=shard.format)
            else:
                builder.download_and_prepare()
                rows = builder.as_dataset(split=shard.format)
            for row, record in enumerate(rows, 1):
                yield text_of(record, shard.name, f"row {row}", self.text_key)
        except Exception as error:  # DatasetGenerationError and others share no base class
            cause = error.__cause__ or error  # some only say that there was one
            raise DataError(f"id = {self.id} - reading stopped after row {row}: {cause}") from error

    def settings(self, split: str) -> dict[str, Any]:
        return {"name": self.name, "split": self._split(split), "text_key": self.text_key}

    def urls(self, split: str) -> list[str]:
        return [self.id]

    def has_validation(self) -> bool:
        return bool(self.list_shards("validation"))


@SourceConfig.register_subclass("tokens")
@dataclass(frozen=True)
class TokensSource(SourceConfig):
    """Raw token files, little-endian and without a header, as nanoGPT's `train.bin`.

    They are mapped as they are: nothing is tokenised and no end of document is added.
    """

    train_bin: list[Location] = field(default_factory=list)
    """Local token files to train on, in order."""
    val_bin: list[Location] = field(default_factory=list)
    """Local token files to evaluate on; empty for none."""
    dir: Location | None = None
    """Folder with `train.bin` and, if any, `val.bin`, in place of the two lists."""
    dtype: Literal["uint16", "uint32", "int64"] = "uint16"
    """Type of the stored ids."""
    tags: list[str] = field(default_factory=list)
    """Labels under which evaluation losses are averaged."""

    def problems(self) -> Iterator[Problem]:
        if self.dir is not None and (self.train_bin or self.val_bin):
            yield Problem("dir", "cannot stand beside train_bin or val_bin", "give one of them")
        elif self.dir is None and not self.train_bin and not self.val_bin:
            yield Problem("train_bin", "names no file", "list token files, or set dir")

    def list_shards(self, split: str) -> list[Shard]:
        script = os.path.join(self.dir or "", "prepare.py")
        try:
            paths = files.find_files(self.urls(split), f"{split} tokens")
        except Unreachable as error:
            if self.dir is None or not os.path.exists(script):
                raise
            raise Unreachable(f"{error} - make it with: python {script}") from error
        return [files.make_shard(path, "tokens") for path in paths]

    def read_shard(self, shard: Shard) -> Iterator[str | BadRecord]:
        raise AssertionError("token files hold no documents to read")

    def settings(self, split: str) -> dict[str, Any]:
        return {"dtype": self.dtype}

    def urls(self, split: str) -> list[str]:
        if self.dir is not None:
            return [os.path.join(self.dir, "train.bin" if split == "train" else "val.bin")]
        return self.train_bin if split == "train" else self.val_bin

    def has_validation(self) -> bool:
        if self.dir is not None:
            return os.path.exists(os.path.expanduser(local_path(self.urls("validation")[0])))
        return super().has_validation()
