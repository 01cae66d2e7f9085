"""Token files: what is none is refused, every id is looked at once, by one of many processes."""

import io
import json
import resource
import subprocess
import sys

import numpy as np
import pytest

from ostro.core.errors import DataError
from ostro.data.cache.store import TokenStore
from ostro.data.sources.source import TokensSource
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer import ByteTokenizer
from ostro.data.tokenizer_config import Gpt2Tokenizer

IDS = np.random.RandomState(0).randint(0, 50000, 4000)


@pytest.fixture
def build(tmp_path):
    def build(content, tokenizer=None, **options):
        (tmp_path / "train.bin").write_bytes(content)
        source = TokensSource([f"{tmp_path}/train.bin"], **options)
        config = LMDatasetConfig(source=source, cache_dir=str(tmp_path / "cache"))
        return config.build(tokenizer or Gpt2Tokenizer().build(), 16, 0, verify=False)

    return build


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (npy(IDS.astype("<u2")), r"NumPy array .*numpy\.load\('.*'\)\.astype\('uint16'\)\.tofile"),
        (IDS.astype("<u4").tobytes(), "look wider than uint16.* set dtype: uint32"),
        (IDS.astype("<i4").tobytes(), "set dtype: uint32"),
        ((IDS * 2).astype("<u4").tobytes(), "set dtype: uint32"),  # ids of more than 16 bits
        (IDS.astype("<i8").tobytes(), "look wider than uint16"),
        (b"A text, as train.txt would hold it. " * 9, "holds text, not uint16 ids"),
        ("Ein längerer Text mit Umlauten: äöü. ".encode() * 200, "holds text"),
        (np.array([20240520, 1, 9], "<i4").tobytes() + bytes(1012), "llm.c"),
        (b"\x1f\x8b\x08" + bytes(997), "compressed with gzip"),
        (b"x" * 101, "101 bytes, no multiple of 2"),
        (b"", "is empty"),
    ],
)
def test_what_is_no_row_of_ids_is_refused(build, content, rule):
    with pytest.raises(DataError, match=rule):
        build(content)


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int64"])
def test_ids_of_each_width_are_read(build, dtype):
    data = build(IDS.astype(dtype).tobytes(), dtype=dtype)
    windows = data.train.sources["data"]
    assert windows.store.read(0, 4000).tolist() == IDS.tolist()


def test_wide_ids_under_a_type_that_is_still_too_narrow(build):
    with pytest.raises(DataError, match="set dtype: int64"):
        build(IDS.astype("<i8").tobytes(), dtype="uint32")


@pytest.mark.parametrize("ids", [[0] * 64, [1, 0] * 64, list(range(1, 65)), [5, 6, 7, 8] * 16])
def test_small_or_uniform_ids_are_not_taken_for_wider_ones(build, ids):
    assert build(np.array(ids, "<u2").tobytes(), ByteTokenizer()).train.num_tokens == len(ids)


def test_an_id_out_of_range_names_file_and_token(build, tmp_path):
    ids = np.full(64, 5, "<u2")
    ids[40] = 300
    with pytest.raises(DataError, match=r"train\.bin - id 300 at token 40 is outside .* of 257"):
        build(ids.tobytes(), ByteTokenizer())
    with pytest.raises(DataError, match="is outside the vocabulary"):
        negative = np.where(np.arange(64) == 40, -1, 5)
        build(negative.astype("<i8").tobytes(), ByteTokenizer(), dtype="int64")


def test_an_id_that_is_damaged_later_is_an_error_where_it_is_read(tmp_path):
    for index in (0, 1):
        np.full(10, 5, "<u2").tofile(tmp_path / f"{index}.bin")
    store = TokenStore.open(
        [tmp_path / "0.bin", tmp_path / "1.bin"], "uint16", 100, "make it again"
    )
    with open(tmp_path / "1.bin", "r+b") as file:
        file.seek(7)
        file.write(b"\x01")
    assert store.read(0, 13).max() == 5
    with pytest.raises(DataError, match=r"1\.bin - id 261 at token 3 .* of 100 - make it again"):
        store.read(8, 16)


def test_an_edit_is_seen_whatever_its_size_and_time(build, tmp_path):
    ids = np.full(1 << 14, 5, "<u2")
    first = build(ids.tobytes(), ByteTokenizer()).fingerprint
    assert build(ids.tobytes(), ByteTokenizer()).fingerprint == first
    record = tmp_path / "cache" / "train" / "tokens.json"
    before = record.read_text()
    ids[7] = 6
    assert build(ids.tobytes(), ByteTokenizer()).fingerprint != first
    assert json.loads(before)["largest"] == [5, 0]
    assert json.loads(record.read_text())["largest"] == [6, 7]


def test_more_files_than_may_be_open(tmp_path):
    for index in range(80):
        np.full(20, index % 50, "<u2").tofile(tmp_path / f"{index:04}.bin")
    source = TokensSource([f"{tmp_path}/*.bin"])
    config = LMDatasetConfig(source=source, cache_dir=str(tmp_path / "cache"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, limits[1]))
    try:
        data = config.build(ByteTokenizer(), 16, 0)
        assert data.train.sources["data"].store.read(0, 1600)[::20].max() == 49
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_processes_that_start_together(tmp_path):
    np.arange(4000, dtype="<u2").__mod__(250).tofile(tmp_path / "train.bin")
    code = f"""
import sys
from ostro.data.sources.source import TokensSource
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer import ByteTokenizer
source = TokensSource([r"{tmp_path}/train.bin"])
sys.stdin.readline()
for turn in range(10):
    config = LMDatasetConfig(source=source, cache_dir=rf"{tmp_path}/cache-{{turn}}")
    print(config.build(ByteTokenizer(), 16, 0).fingerprint)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, **pipes) for _ in range(4)]
    for process in started:
        process.stdin.write("\n")
        process.stdin.flush()
    results = {process.communicate(timeout=120)[0] for process in started}
    assert [process.returncode for process in started] == [0] * 4
    assert len(results) == 1 and next(iter(results)).count("\n") == 10
    assert not list(tmp_path.glob("cache-*/**/*.tmp"))
