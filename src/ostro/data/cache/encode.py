"""Encoding documents in parallel and in order, on threads, processes or a Ray cluster."""

import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from ostro.data.cache.documents import UNKNOWN
from ostro.data.cache.on_ray import ray_workers
from ostro.data.cuts import next_cut
from ostro.data.sources.files import BadRecord, Document
from ostro.data.sources.long_text import LongText
from ostro.data.special_tokens import spelling
from ostro.data.tokenizer import SpecialTokens, Tokenizer

PIECE_CHARS = 1 << 14
"""Long documents are encoded in pieces of about this many characters where that is exact."""
_LIBRARY_THREADS = "TOKENIZERS_PARALLELISM"


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    is_last: bool
    record: int = 1  # 1-based number of the document's record in its file
    byte: int = UNKNOWN  # bytes before that record


def pieces(
    records: Iterable[str | LongText | BadRecord], splittable: bool
) -> Iterator[Piece | BadRecord]:
    """Cut long documents where the ids stay the same; empty documents are dropped."""
    for number, record in enumerate(records, 1):
        if isinstance(record, BadRecord):
            yield record
            continue
        if isinstance(record, LongText):
            if splittable:
                yield from _long_pieces(record, number)
                continue
            record = _placed(record)
        known = isinstance(record, Document)
        place, start = (record.record, record.byte) if known else (number, UNKNOWN), 0
        while splittable and len(record) - start > 2 * PIECE_CHARS:
            cut = next_cut(record, start + PIECE_CHARS)
            if cut is None:
                break
            yield Piece(record[start:cut], False, *place)
            start = cut
        if record:
            yield Piece(record[start:], True, *place)


def _long_pieces(text: LongText, number: int) -> Iterator[Piece]:
    byte = UNKNOWN if text.byte is None else text.byte
    last = None
    for piece in pieces(text.parts(), splittable=True):
        assert isinstance(piece, Piece), "a part is text"
        if last is not None:
            yield Piece(last.text, False, number, byte)
        last = piece
    if last is not None:
        yield Piece(last.text, True, number, byte)


def _placed(text: LongText) -> str:
    return str(text) if text.byte is None else Document(str(text), 1, text.byte)


class Encoded(NamedTuple):
    """What pieces have become."""

    tokens: np.ndarray
    lengths: np.ndarray  # tokens of each piece
    spelled: Counter[str]  # special tokens that their texts spell


def encode(
    tokenizer: Tokenizer,
    eos_id: int | None,
    dtype: str,
    special_tokens: SpecialTokens,
    texts: Sequence[Piece],
) -> Encoded:
    """Tokens of the pieces, with the end of document behind each last one."""
    eos = np.array([] if eos_id is None else [eos_id], dtype=dtype)
    parts, lengths = [eos[:0]], []
    encoded = tokenizer.encode_documents([piece.text for piece in texts], special_tokens)
    for ids, piece in zip(encoded, texts, strict=True):
        parts.append(ids)
        lengths.append(len(ids))
        if piece.is_last and not (len(ids) and ids[-1] == eos_id):  # the template may have added it
            parts.append(eos)
            lengths[-1] += len(eos)
    spelled: Counter[str] = Counter()
    if pattern := spelling(tokenizer.special_tokens):
        for piece in texts:
            spelled.update(pattern.findall(piece.text))
    tokens = np.concatenate(parts).astype(dtype, copy=False)
    return Encoded(tokens, np.array(lengths, dtype=np.int64), spelled)


def usable_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Encoder:
    """Workers that encode."""

    num_workers: int
    submit: Callable[[Sequence[Piece]], Future]

    def run(self, batches: Iterable[Any], texts_of: Callable) -> Iterator[tuple[Any, Encoded]]:
        """(batch, what `encode` made of it) in the order of the batches, a bounded number ahead."""
        pending: deque[tuple] = deque()
        for batch in batches:
            pending.append((batch, self.submit(texts_of(batch))))
            if len(pending) > 2 * self.num_workers:
                done, future = pending.popleft()
                yield done, future.result()
        for done, future in pending:
            yield done, future.result()


@contextmanager
def encoder(
    tokenizer: Tokenizer,
    eos_id: int | None,
    dtype: str,
    num_workers: int | None,
    ray_address: str | None = None,
    special_tokens: SpecialTokens = "text",
) -> Iterator[Encoder]:
    """Start workers: on a Ray cluster if there is an address, else `num_workers` here.

    Threads serve up to a dozen cores, as the library lets go of Python's lock while it encodes;
    beyond that, turning ids into arrays would hold them up, so processes are taken. The library's
    own threads are kept off: it starts every batch on them with an empty word cache, which makes
    the small batches that a restartable build needs slow.
    """
    setup = (tokenizer, eos_id, dtype, special_tokens)
    encode(*setup, [])  # what is made once is made here, not by every worker
    if ray_address is not None:
        with ray_workers(ray_address, encode, setup) as (count, submit):
            yield Encoder(count, submit)
        return
    count = num_workers or usable_cores()
    processes = count > (12 if num_workers is None else 1)
    before = os.environ.get(_LIBRARY_THREADS)
    os.environ[_LIBRARY_THREADS] = "false"
    executor: Executor
    if processes:
        context = multiprocessing.get_context("spawn")
        executor = ProcessPoolExecutor(count, context, _start_worker, setup)
        function: Callable = _encode_in_worker
    else:
        executor = ThreadPoolExecutor(count, "encode")
        function = partial(encode, *setup)
    try:
        yield Encoder(count, partial(executor.submit, function))
    finally:
        executor.shutdown(wait=True, cancel_futures=True)
        if before is None:
            os.environ.pop(_LIBRARY_THREADS, None)
        else:
            os.environ[_LIBRARY_THREADS] = before


_setup: tuple | None = None


def _start_worker(*setup: Any) -> None:
    """Set up a worker process: deaf to Ctrl-C, and gone when its parent is."""
    global _setup
    _setup = setup
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None, "runs in a child process"

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _encode_in_worker(texts: Sequence[Piece]) -> Encoded:
    assert _setup is not None, "the worker was started"
    return encode(*_setup, texts)
