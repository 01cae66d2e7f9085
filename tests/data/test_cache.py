"""The token cache: built once, in order, restartable, and never used for other data."""

import errno
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ostro.core.errors import DataError
from ostro.data.cache.build import CacheRequest, open_cache
from ostro.data.cache.store import CacheDir, TokenStore, locked
from ostro.data.sources.source import UrlsSource
from ostro.data.tokenizer_config import BytesTokenizer, Gpt2Tokenizer

BYTES = BytesTokenizer().build()


def write_lines(path, texts):
    content = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


@pytest.fixture
def files(tmp_path):
    texts = [[f"file {f} document {i} " * (i % 7) for i in range(40)] for f in range(3)]
    names = ["a.jsonl", "b.jsonl.gz", "c.jsonl"]
    return [write_lines(tmp_path / n, t) for n, t in zip(names, texts, strict=True)]


@pytest.fixture
def where(tmp_path):
    return CacheDir(str(tmp_path / "cache"))


def request_for(files, **options):
    return CacheRequest(
        "train", UrlsSource([str(path) for path in files]), "train", BYTES, **options
    )


def expected_tokens(files):
    tokens = []
    for path in files:
        data = Path(path).read_bytes()
        for line in (gzip.decompress(data) if path.endswith(".gz") else data).splitlines():
            if text := json.loads(line)["text"]:
                tokens += [*text.encode(), 256]
    return tokens


def content(folder):
    """Every file but the lock and what this machine remembers of the sources."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_documents_come_in_order(files, where):
    cache = open_cache(request_for(files), where)
    expected = expected_tokens(files)
    assert cache.store.read(0, cache.store.num_tokens).tolist() == expected
    assert cache.num_documents == expected.count(256) and cache.num_bad_records == 0
    names = ["checksums.bin", "documents.bin", "ledger.json", "tokens-00000.bin"]
    assert sorted(content(cache.folder)) == names


def test_without_end_of_document(files, where):
    cache = open_cache(request_for(files, enforce_eos=False), where)
    assert 256 not in cache.store.read(0, cache.store.num_tokens)


@pytest.mark.parametrize("workers", [1, 2])
def test_the_files_do_not_depend_on_workers(files, where, tmp_path, workers):
    plain = open_cache(request_for(files), where)
    other = CacheDir(str(tmp_path / "other"))
    again = open_cache(request_for(files, num_workers=workers), other)
    assert content(plain.folder) == content(again.folder)
    assert plain.store.read(0, plain.store.num_tokens).tolist() == expected_tokens(files)


def test_a_cache_may_have_several_token_files(files, where):
    """As earlier versions wrote them."""
    cache = open_cache(request_for(files), where)
    ledger = json.loads((cache.folder / "ledger.json").read_text())
    del ledger["checksums"]
    data = (cache.folder / "tokens-00000.bin").read_bytes()
    (cache.folder / "tokens-00000.bin").write_bytes(data[:600])
    (cache.folder / "tokens-00001.bin").write_bytes(data[600:])
    ledger["shards"] = [
        {"file": "tokens-00000.bin", "tokens": 300},
        {"file": "tokens-00001.bin", "tokens": len(data) // 2 - 300},
    ]
    (cache.folder / "ledger.json").write_text(json.dumps(ledger))
    store = open_cache(request_for(files), where).store
    assert store.read(0, store.num_tokens).tolist() == expected_tokens(files)


def test_a_large_vocabulary_is_stored_in_four_bytes(files, where):
    class Large(type(BYTES)):
        vocab_size, fingerprint = 70_000, "large"

    cache = open_cache(replace(request_for(files), tokenizer=Large()), where)
    assert (cache.folder / "tokens-00000.bin").stat().st_size == 4 * cache.store.num_tokens
    assert cache.store.read(0, cache.store.num_tokens).tolist() == expected_tokens(files)


def test_a_finished_cache_is_not_built_again(files, where, monkeypatch):
    first = open_cache(request_for(files), where)
    monkeypatch.setattr("ostro.data.cache.build._Build", None)
    assert open_cache(request_for(files), where).fingerprint == first.fingerprint


def test_moved_files_fit_as_their_content_is_the_same(files, where, tmp_path):
    first = open_cache(request_for(files), where)
    (tmp_path / "moved").mkdir()
    moved = [tmp_path / "moved" / os.path.basename(path) for path in files]
    for old, new in zip(files, moved, strict=True):
        os.rename(old, new)
    assert open_cache(request_for(moved), where).fingerprint == first.fingerprint


def test_what_does_not_fit_is_named_key_by_key(files, where, tmp_path):
    open_cache(request_for(files), where)
    before = content(where.local / "train")
    write_lines(tmp_path / "a.jsonl", ["changed"])
    extra = write_lines(tmp_path / "d.jsonl", ["more"])
    gpt2 = Gpt2Tokenizer().build()
    source = UrlsSource([files[0], files[2], extra], format="jsonl")
    request = CacheRequest("train", source, "train", gpt2, enforce_eos=False)
    with pytest.raises(DataError) as caught:
        open_cache(request, where)
    text = str(caught.value)
    for part in ("set another cache_dir, delete the folder, or set rebuild_cache: true",
                 "enforce_eos: built with True, the configuration has False",
                 "source.format: built with auto, the configuration has jsonl",
                 "tokenizer.vocab_size: built with 257, the configuration has 50257",
                 f"files: changed {files[0]}; removed {files[1]}; added {extra}"):  # fmt: skip
        assert part in text
    assert content(where.local / "train") == before
    with pytest.raises(DataError, match="the same files in another order"):
        write_lines(tmp_path / "a.jsonl", [])
        other = CacheDir(str(tmp_path / "two"))
        open_cache(request_for(files[:2]), other)
        open_cache(request_for(files[1::-1]), other)


def test_rebuilding_has_to_be_asked_for(files, where):
    open_cache(request_for(files), where)
    cache = open_cache(request_for(files[:1], rebuild=True), where)
    assert cache.store.num_tokens == len(expected_tokens(files[:1]))
    assert open_cache(request_for(files[:1]), where).fingerprint == cache.fingerprint


def test_a_finished_cache_serves_without_its_files(files, where, caplog):
    first = open_cache(request_for(files), where)
    for path in files:
        os.unlink(path)
    again = open_cache(request_for(files), where)
    assert again.store.num_tokens == first.store.num_tokens
    assert "using the finished cache without its files" in caplog.text
    with pytest.raises(DataError, match="places: built with"):
        open_cache(request_for(files[:1]), where)
    with pytest.raises(DataError, match="no such file"):
        open_cache(replace(request_for(files), name="else"), where)


def test_a_damaged_cache_is_refused(files, where):
    cache = open_cache(request_for(files), where)
    with open(cache.folder / "tokens-00000.bin", "ab") as file:
        file.truncate(10)
    with pytest.raises(DataError, match="wrong size, the cache is damaged - delete"):
        open_cache(request_for(files), where)
    (cache.folder / "ledger.json").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        open_cache(request_for(files), where)


def test_a_bad_record_stops_or_is_left_out(files, where, tmp_path, caplog):
    with open(files[0], "ab") as file:
        file.write(b'{"text": 1}\nnot json\n')
    with pytest.raises(DataError, match=r"a\.jsonl, line 41 - .*on_bad_record: skip"):
        open_cache(request_for(files), where)
    cache = open_cache(request_for(files, on_bad_record="skip"), where)
    assert cache.num_bad_records == 2
    assert cache.store.num_tokens == len(expected_tokens_skipping(files))
    lines = (cache.folder / "quarantine.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["file"], r["where"], r["raw"]) for r in records] == [
        (files[0], "line 41", "{'text': 1}"), (files[0], "line 42", "not json")
    ]  # fmt: skip
    assert caplog.text.count("left out 2 bad records") == 1
    open_cache(request_for(files, on_bad_record="skip"), where)
    assert caplog.text.count("left out 2 bad records") == 1
    with pytest.raises(DataError, match="on_bad_record: 2 bad records were left out"):
        open_cache(request_for(files), where)


def expected_tokens_skipping(files):
    with open(files[0], "rb+") as file:
        kept = file.readlines()[:-2]
        file.truncate(sum(map(len, kept)))
        tokens = expected_tokens(files)
        file.seek(0, 2)
        file.write(b'{"text": 1}\nnot json\n')
    return tokens


def test_an_empty_corpus(tmp_path, where):
    path = write_lines(tmp_path / "a.jsonl", ["", ""])
    with pytest.raises(DataError, match="train - the corpus is empty: 1 files hold no text"):
        open_cache(request_for([path]), where)
    with pytest.raises(DataError, match="the corpus is empty"):  # and is not finished either
        open_cache(request_for([path]), where)


def test_a_truncated_file_is_never_skipped(files, where):
    data = Path(files[1]).read_bytes()
    Path(files[1]).write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"b\.jsonl\.gz - cannot be read to its end"):
        open_cache(request_for(files, on_bad_record="skip"), where)
    assert not (where.local / "train" / "ledger.json").exists()


class Counting(type(BYTES)):
    """Counts the characters it is given."""

    def __init__(self):
        self.count = 0

    def encode_documents(self, texts, special_tokens="text"):
        self.count += sum(map(len, texts))
        return super().encode_documents(texts, special_tokens)


def build(folder, files, stop=None):
    """Build a cache, counting; with `stop`, print the count at half and die of that signal."""
    tokenizer = Counting()

    def progress(name, done, total):
        if stop is not None and done >= total / 2:
            print(tokenizer.count, flush=True)
            os.kill(os.getpid(), stop)

    request = replace(request_for(files), tokenizer=tokenizer)
    open_cache(request, CacheDir(str(folder)), progress)
    return tokenizer.count


@pytest.mark.parametrize(
    ("stop", "kind"), [(signal.SIGKILL, "many"), (signal.SIGKILL, "one"), (signal.SIGINT, "many")]
)
def test_a_killed_build_goes_on_where_it_was(tmp_path, stop, kind):
    text = "".join(f"line {i} of a long document\n" for i in range(100_000))
    files = [tmp_path / "one.txt"]
    files[0].write_text(text)
    if kind == "many":
        files = [tmp_path / f"{i}.jsonl" for i in range(3)]
        for path, size in zip(files, [len(text) // 3, len(text) // 3, len(text)], strict=True):
            write_lines(path, [text[at : at + 5000] for at in range(0, size, 5000)])
    total = build(tmp_path / "undisturbed", files)
    listen = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # as a shell
    code = f"{listen}; import test_cache as t; "
    code += f"t.build({str(tmp_path / 'cache')!r}, {[*map(str, files)]}, "
    killed = subprocess.run(
        [sys.executable, "-c", f"{code}{int(stop)})"],
        capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent,
    )  # fmt: skip
    assert killed.returncode in (-stop, 128 + stop), killed.stderr
    before = int(killed.stdout)
    assert 0.45 * total < before < 0.6 * total
    assert not (tmp_path / "cache/train/ledger.json").exists()
    after = build(tmp_path / "cache", files)
    assert 0 <= before + after - total <= 0.05 * total
    assert content(tmp_path / "undisturbed/train") == content(tmp_path / "cache/train")


def test_ctrl_c_keeps_what_was_built(files, where):
    def progress(name, done, total):
        if done:
            raise KeyboardInterrupt

    request = request_for(files)
    with pytest.raises(KeyboardInterrupt):
        open_cache(request, where, progress)
    state = json.loads((where.local / "train" / "progress.jsonl").read_text().splitlines()[-1])
    assert state["documents"] > 0
    cache = open_cache(request, where)
    assert cache.store.read(0, cache.store.num_tokens).tolist() == expected_tokens(files)


def test_files_that_are_no_cache_are_left_alone(tmp_path):
    """The cache of `train` in the folder above the texts would lie among them."""
    folder = tmp_path / "train"
    (folder / "more").mkdir(parents=True)
    path = write_lines(folder / "a.jsonl", ["a document"])
    with pytest.raises(DataError, match=r"holds a\.jsonl, more, and the cache needs a folder"):
        open_cache(request_for([path]), CacheDir(str(tmp_path)))
    assert sorted(each.name for each in folder.iterdir()) == ["a.jsonl", "more"]


def test_an_unfinished_cache_of_other_data_is_thrown_away(files, where, caplog):
    with pytest.raises(KeyboardInterrupt):
        open_cache(request_for(files), where, lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    cache = open_cache(request_for(files[2:]), where)
    assert "thrown away" in caplog.text
    assert cache.store.read(0, cache.store.num_tokens).tolist() == expected_tokens(files[2:])


@pytest.mark.parametrize("damage", ["tokens cut", "tokens lost", "half a note"])
def test_a_note_that_does_not_hold_is_gone_back_behind(tmp_path, where, monkeypatch, damage):
    """As a power failure may leave it: a note on the disk, what it speaks of not."""
    path = write_lines(tmp_path / "a.jsonl", [f"document {i} " * 400 for i in range(200)])
    with monkeypatch.context() as patch:
        closes = lambda writer: [file.close() for file in writer._files.values()]  # noqa: E731
        patch.setattr("ostro.data.cache.build._Writer.commit_quietly", closes)

        def progress(name, done, total):
            if done > total / 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            open_cache(request_for([path]), where, progress)
    tokens, notes = (where.local / "train" / n for n in ("tokens-00000.bin", "progress.jsonl"))
    lines = notes.read_bytes().splitlines()
    size = json.loads(lines[-1])["files"][tokens.name][0]
    assert len(lines) > 2
    if damage == "half a note":
        notes.write_bytes(notes.read_bytes()[:-5])
    else:
        with open(tokens, "rb+") as file:
            file.truncate(size - 10)
            file.truncate(size - 10 if damage == "tokens cut" else size)
    count = []
    cache = open_cache(request_for([path]), where, lambda name, done, total: count.append(done))
    assert min(count) > 0.2 * os.path.getsize(path)
    assert cache.store.read(0, cache.store.num_tokens).tolist() == expected_tokens([path])


def test_a_full_disk_is_one_message_and_nothing_counts(files, where, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("ostro.data.cache.build.os.fsync", full)
        with pytest.raises(DataError, match="the disk is full - make room or set cache_dir"):
            open_cache(request_for(files), where)
    folder = where.local / "train"
    assert not (folder / "ledger.json").exists()
    cache = open_cache(request_for(files), where)
    assert cache.store.read(0, cache.store.num_tokens).tolist() == expected_tokens(files)


def test_a_second_process_waits_and_finds_it_finished(files, where, caplog):
    caplog.set_level("INFO", "ostro.data")
    results = []
    (where.local / "train").mkdir(parents=True)
    waiter = threading.Thread(target=lambda: results.append(open_cache(request_for(files), where)))
    with locked(where.local / "train"):
        waiter.start()
        while "waiting for it" not in caplog.text:
            assert waiter.is_alive()
        assert not results
    waiter.join()
    assert results[0].store.num_tokens == len(expected_tokens(files))


def test_a_cache_behind_a_url(files, tmp_path, monkeypatch):
    monkeypatch.setenv("OSTRO_CACHE_HOME", str(tmp_path / "first machine"))
    url = f"memory://{tmp_path.name}/cache/"
    cache = open_cache(request_for(files), CacheDir(url))
    stored = fsspec.filesystem("memory").ls(f"/{tmp_path.name}/cache/train", detail=False)
    assert len(stored) == 4 and any(name.endswith("ledger.json") for name in stored)

    monkeypatch.setenv("OSTRO_CACHE_HOME", str(tmp_path / "second machine"))
    monkeypatch.setattr("ostro.data.cache.build._Build", None)
    copy = open_cache(request_for(files), CacheDir(url))
    assert copy.folder != cache.folder and content(copy.folder) == content(cache.folder)
    assert copy.store.read(0, copy.store.num_tokens).tolist() == expected_tokens(files)
    with pytest.raises(DataError, match="does not fit"):
        open_cache(request_for(files[:1]), CacheDir(url))


def test_a_cache_url_nobody_can_read():
    with pytest.raises(DataError, match="cache_dir = nowhere://x - cannot be used"):
        CacheDir("nowhere://x")


def test_the_largest_id_and_its_place():
    assert TokenStore([np.array([1, 9], "<u2"), np.array([3, 9], "<u2")]).largest() == (9, 1)
