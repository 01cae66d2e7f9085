"""Fingerprints of a source's shards, as ledgers list them: `[name, size, fingerprint]`."""

import contextlib
import hashlib
import logging
import marshal
from collections.abc import Iterable, Sequence
from pathlib import Path

from ostro.core.redaction import redact
from ostro.data.cache.identity import LISTING, Stamps, is_sampled, require_unchanged, write_whole
from ostro.data.sources.files import Shard
from ostro.runtime.garbage import no_collections

logger = logging.getLogger("ostro.data")


def file_list(shards: Sequence[Shard], fingerprints: Iterable[str]) -> list[list]:
    """Shards as a ledger records them."""
    names = [shard.name for shard in shards]
    together = redact("\n".join(names)).split("\n")  # once: there may be very many
    names = together if len(together) == len(names) else [redact(name) for name in names]
    rows = zip(names, shards, fingerprints, strict=True)
    return [[name, shard.size, print_] for name, shard, print_ in rows]


@no_collections()
def known_files(folder: Path, shards: Sequence[Shard], recorded: list[list]) -> list[list]:
    """Shards as they are now, for comparison with a folder's `recorded` ones.

    Files that have changed since they were last read, by their stamps, are read again.
    """
    listed, digest = folder / LISTING, _digest(shards, recorded)
    with contextlib.suppress(OSError):
        if listed.read_bytes() == digest:  # very many files take long one by one
            return recorded
    stamps = Stamps(folder)
    by_size = {size: print_ for _, size, print_ in recorded}
    prints, num_read, unsure = [], 0, []
    for shard in shards:
        print_ = shard.fingerprint or stamps.get(shard.stamps)
        like = by_size.get(shard.size)
        if not print_ and like is None:
            print_ = f"other size: {shard.name}"  # as nothing that was recorded
        elif not print_ or (not shard.fingerprint and like and _is_other(print_, like, shard)):
            print_ = shard.hash_files(sampled=is_sampled(like or "", shard.size))
            stamps.put(shard.stamps, print_)
            num_read += 1
            if stamps.were_kept and is_sampled(print_, shard.size) and print_ == like:
                unsure.append(shard.name)
        prints.append(print_)
    if num_read and stamps.were_kept:
        logger.info("%s: %d files changed or moved since they were read; their content was compared"
                    " with the cache", folder, num_read)  # fmt: skip
    if unsure:
        logger.warning(
            "%s: %s changed since the cache was built, by an earlier version that knows large files"
            " by samples only - to be sure, build it again with --data.rebuild_cache true",
            folder, ", ".join(unsure[:3]),
        )  # fmt: skip
    files = file_list(shards, prints)
    if not num_read and [row[1:] for row in files] == [row[1:] for row in recorded]:
        with contextlib.suppress(OSError):
            write_whole(listed, digest)
    stamps.save()
    return files


def _digest(shards: Sequence[Shard], recorded: list[list]) -> bytes:
    """What stands for all that shards are known by, beside what was recorded of them."""
    # By columns, which marshal takes, as JSON in a tenth of the time, but without named tuples;
    # its version 2 has no references between equal objects.
    known = [shard[:3] for shard in shards]
    stamps = [[file.stamp for file in shard.files] for shard in shards]
    return hashlib.sha256(marshal.dumps([known, stamps, recorded], 2)).hexdigest().encode()


def _is_other(print_: str, like: str, shard: Shard) -> bool:
    """Whether one of two fingerprints is by samples and the other is not."""
    return is_sampled(print_, shard.size) != is_sampled(like, shard.size)


def read_files(folder: Path, shards: Sequence[Shard]) -> list[list]:
    """Shards with the fingerprints of their content, which is read."""
    stamps = Stamps(folder)
    prints = []
    for shard in shards:
        prints.append(shard.fingerprint or shard.hash_files())
        require_as_listed(shard)
        if not shard.fingerprint:
            stamps.put(shard.stamps, prints[-1])
    stamps.save()
    return file_list(shards, prints)


def require_as_listed(shard: Shard) -> None:
    """`DataError` where a file of a shard has changed since the listing."""
    for file in shard.files:
        require_unchanged(file.path, file.stamp)
