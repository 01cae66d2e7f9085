"""Token files in nanoGPT's layout: what the `data/*/prepare.py` scripts have in common.

`train.bin` and `val.bin` hold ids as little-endian uint16, one after the other, without a header.
"""

import http.client
import os
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ostro.core.errors import DataError, OstroError
from ostro.core.units import format_count
from ostro.data.cache.encode import Piece, encoder, pieces
from ostro.data.tokenizer import Tokenizer

SPLITS = ("train", "val")
Document = tuple[str, str]
"""The split that a text goes to, and the text."""

_BATCH_CHARS = 1 << 20
_REPORT_EVERY = 100_000_000


def write_token_files(
    out_dir: Path,
    documents: Iterable[Document],
    tokenizer: Tokenizer,
    beside: Mapping[str, bytes] | None = None,
) -> dict[str, int]:
    """Write `train.bin` and `val.bin`, and the files `beside`, all of them or none.

    Every document ends with the tokenizer's end of document, if it has one. What is held in memory
    does not grow with the text. Returns the tokens of each split.
    """
    if tokenizer.vocab_size > 1 << 16:
        raise DataError(f"{out_dir} - {tokenizer.vocab_size} different tokens do not fit uint16")
    counts = dict.fromkeys(SPLITS, 0)
    with _staged(out_dir) as folder:
        with ExitStack() as stack:
            files = {s: stack.enter_context(open(folder / f"{s}.bin", "wb")) for s in SPLITS}
            workers = stack.enter_context(encoder(tokenizer, tokenizer.eos_id, "<u2", None))
            batches = _batches(documents, tokenizer.splittable)
            for (split, _), (tokens, _, _) in workers.run(batches, lambda batch: batch[1]):
                before, counts[split] = counts[split], counts[split] + len(tokens)
                tokens.tofile(files[split])
                if counts[split] // _REPORT_EVERY > before // _REPORT_EVERY:
                    print(f"{split}: {format_count(counts[split])} tokens ...", flush=True)
        for split, count in counts.items():
            if count == 0:
                raise DataError(f"{out_dir / split}.bin - no text is left for it - give more text")
        for name, content in (beside or {}).items():
            (folder / name).write_bytes(content)
    return counts


def _batches(documents: Iterable[Document], splittable: bool) -> Iterator[tuple[str, list[Piece]]]:
    """Pieces of the texts in batches for the encoder, every batch of one split."""
    waiting: dict[str, list[Piece]] = {split: [] for split in SPLITS}
    sizes = dict.fromkeys(SPLITS, 0)
    for split, text in documents:
        for piece in pieces([text], splittable):
            waiting[split].append(piece)
            sizes[split] += len(piece.text)
            if sizes[split] >= _BATCH_CHARS:
                yield split, waiting[split]
                waiting[split], sizes[split] = [], 0
    yield from ((split, batch) for split, batch in waiting.items() if batch)


@contextmanager
def _staged(out_dir: Path) -> Iterator[Path]:
    """A folder within `out_dir` whose files move there once all are written; none on an error."""
    out_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out_dir) as name:
        yield Path(name)
        for path in sorted(Path(name).iterdir()):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            os.replace(path, out_dir / path.name)


def cut_in_two(text: str, val_fraction: float = 0.1) -> Iterator[Document]:
    """The first part of a text for training, the rest for validation."""
    cut = int(len(text) * (1 - val_fraction))
    yield "train", text[:cut]
    yield "val", text[cut:]


def download(url: str, offline_flag: str) -> bytes:
    """The content of a URL; without network, an error that names the flag to use instead."""
    try:
        with urllib.request.urlopen(url, timeout=60) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"{url} - cannot be fetched: {error} - check the network, or give {offline_flag}"
        ) from error


def read_text(path: Path, setting: str) -> str:
    """A UTF-8 text file with any kind of line ends."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        rule = "is not UTF-8" if isinstance(error, UnicodeDecodeError) else "cannot be read"
        raise DataError(f"{setting} = {path} - {rule} ({error}) - give a text file") from error


def report(out_dir: Path, counts: Mapping[str, int], command: str) -> None:
    """Say what was written and what to type next; `{dataset}` in the command is its name."""
    for split, count in counts.items():
        print(f"{_seen_from('.', out_dir / split)}.bin: {count:,} tokens")
    print(f"next: {command.format(dataset=_seen_from('data', out_dir))}")


def _seen_from(base: str, path: Path) -> str:
    """The path below `base`, or the whole path where it lies elsewhere."""
    below = os.path.relpath(path, base)
    return os.path.abspath(path) if below.startswith("..") else below


def run_script(script: Callable[[], None]) -> None:
    """Run a script's main function; a mistake or a full disk is one line and exit code 2."""
    try:
        return script()
    except OstroError as error:
        message = str(error)
    except OSError as error:
        message = f"{error} - mend it, or set another --out_dir"
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    sys.exit(2)
