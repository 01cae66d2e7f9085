"""Sources: every format, every mistake."""

import bz2
import gzip
import json
import lzma

import fsspec
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from ostro.core.errors import DataError
from ostro.data.sources.files import BadRecord, Unreachable, find_files, guess_format
from ostro.data.sources.source import HfSource, StdlibSource, TokensSource, UrlsSource

DOCS = ["first", "zweites Dokument: ä", "third\nwith lines"]
LINES = "".join(json.dumps({"text": doc, "n": i}) + "\n" for i, doc in enumerate(DOCS)).encode()


def read(source, split="train"):
    return [text for shard in source.list_shards(split) for text in source.read_shard(shard)]


def urls(*paths, **options):
    return UrlsSource([str(path) for path in paths], **options)


def parquet(path, **columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), str(path))
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", LINES),
        ("a.ndjson", b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\r\n\n")),
        ("a.jsonl.gz", gzip.compress(LINES[:40], mtime=0) + gzip.compress(LINES[40:], mtime=0)),
        ("a.jsonl.bz2", bz2.compress(LINES)),
        ("a.jsonl.zst", zstandard.compress(LINES[:40]) + zstandard.compress(LINES[40:])),
        ("a.json", LINES),
        ("a.json", json.dumps([json.loads(line) for line in LINES.splitlines()]).encode()),
        ("a.json", json.dumps([json.loads(x) for x in LINES.splitlines()], indent=2).encode()),
        ("a.json.gz", gzip.compress(LINES, mtime=0)),
    ],
)
def test_json_formats(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(urls(tmp_path / name)) == DOCS


def test_a_single_object_is_one_document(tmp_path):
    (tmp_path / "a.json").write_text('{\n  "body": "x"\n}\n')
    assert read(urls(tmp_path / "a.json", text_key="body")) == ["x"]


def test_parquet(tmp_path):
    path = parquet(tmp_path / "a.parquet", text=DOCS, n=[1, 2, 3])
    assert read(urls(path)) == DOCS
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert read(urls(tmp_path / "b.parquet.gz")) == DOCS
    with pytest.raises(DataError, match=r"no column 'texts', only 'text', 'n'.*did you mean text"):
        read(urls(path, text_key="texts"))
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"a\.parquet - cannot be read to its end"):
        read(urls(path))


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.py", "A.TXT", "a.txt.gz", "a.md.zst"])
def test_a_text_file_is_one_document(tmp_path, name):
    pack = {"gz": gzip.compress, "zst": zstandard.compress}.get(name.split(".")[-1], bytes)
    (tmp_path / name).write_bytes(pack("line 1\r\nline ä\n".encode()))
    assert read(urls(tmp_path / name)) == ["line 1\r\nline ä\n"]


def test_unknown_suffix(tmp_path):
    (tmp_path / "a.xyz").write_text("hello")
    with pytest.raises(DataError, match=r"ending in \.xyz - set format to one of text, jsonl"):
        read(urls(tmp_path / "a.xyz"))
    assert read(urls(tmp_path / "a.xyz", format="text")) == ["hello"]
    assert guess_format("https://x.org/a.jsonl.gz?download=1") == "jsonl"


def test_braces_globs_and_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("t.10.txt", "t.2.txt", "t.1.txt", "u/x.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    assert read(UrlsSource(["t.{1..2}.txt", "**/x.txt"])) == ["t.1.txt", "t.2.txt", "u/x.txt"]
    assert find_files(["t.*.txt"], "x") == ["t.1.txt", "t.10.txt", "t.2.txt"]
    assert read(UrlsSource([], ["t.10.txt"]), "validation") == ["t.10.txt"]


def test_all_missing_files_in_one_message(tmp_path):
    (tmp_path / "here.txt").write_text("x")
    wrong = [f"{tmp_path}/{name}" for name in ("gone.{1..2}.txt", "*.jsonl", "", "here.txt")]
    with pytest.raises(Unreachable) as caught:
        read(UrlsSource([f"{tmp_path}/here.txt", *wrong]))
    text = str(caught.value)
    for part in (
        "gone.1.txt: no such file",
        "gone.2.txt: no such file",
        "*.jsonl: the pattern matches no file",
        "is a folder; name its files",
        "here.txt: listed twice",
        "train_urls - 5 of",
    ):
        assert part in text


def test_any_fsspec_url():
    files = fsspec.filesystem("memory")
    for index in (1, 2):
        with files.open(f"/corpus/a{index}.jsonl.gz", "wb") as file:
            file.write(gzip.compress(LINES, mtime=0))
    source = UrlsSource(["memory://corpus/a{1..2}.jsonl.gz"])
    assert read(source) == DOCS * 2
    assert read(UrlsSource(["memory://corpus/*.gz"])) == DOCS * 2
    with pytest.raises(Unreachable, match=r"memory://corpus/b\.txt: no such file"):
        read(UrlsSource(["memory://corpus/b.txt"]))
    with pytest.raises(Unreachable, match=r"nowhere://x/a\.txt: .*nowhere"):
        read(UrlsSource(["nowhere://x/a.txt"]))


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz"])
@pytest.mark.parametrize("damage", ["cut", "garbage"])
def test_damaged_archives(tmp_path, suffix, damage):
    pack = {"gz": gzip.compress, "zst": zstandard.compress, "xz": lzma.compress}[suffix]
    packed = pack(b"".join(b'{"text": "%d"}\n' % (i * 7919) for i in range(5000)))
    content = packed[: len(packed) // 2] if damage == "cut" else b"not an archive at all"
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=rf"a\.jsonl\.{suffix} - cannot be read to its end.*damaged"
    ):
        read(urls(path))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "x"', "is not JSON"),
        (b'{"txt": "x"}', "no key 'text' (it has 'txt') - set text_key; did you mean txt?"),
        (b'{"text": 5}', "'text' is a number, not a text"),
        (b'{"text": null}', "'text' is null, not a text"),
        (b'"text"', "is a string, not an object"),
        (b"null", "is null, not an object"),
        (b'{"text": "x", "n": ' + b"1" * 5000 + b"}", "holds a number of more than 4,300 digits"),
        (b'{"text": "\xff\xfe"}', "is not UTF-8"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_bad_records_say_where_and_why(tmp_path, line, reason):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "end"}\n')
    first, bad, last = read(urls(tmp_path / "a.jsonl"))
    assert (first, last) == ("good", "end")
    assert isinstance(bad, BadRecord) and bad.where == "line 3" and reason in bad.reason
    assert str(bad).startswith(f"{tmp_path}/a.jsonl, line 3 - ")


def test_bad_records_of_other_formats(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\n")
    (bad,) = read(urls(tmp_path / "a.txt"))
    assert (bad.where, bad.reason) == ("line 3", "is not UTF-8")
    (tmp_path / "a.json").write_text('[{"text": "x"}, {"no": 1}]')
    assert read(urls(tmp_path / "a.json"))[1].where == "record 2"
    (tmp_path / "b.json").write_text('[\n{"text": "x"},\n{"text": }\n]')
    assert read(urls(tmp_path / "b.json"))[0].where == "line 3"
    path = parquet(tmp_path / "a.parquet", text=["x", None, "y"])
    assert [getattr(item, "where", item) for item in read(urls(path))] == ["x", "row 2", "y"]


def test_fingerprints_go_by_content(tmp_path):
    prints = []
    for name, content in (("a.txt", "x"), ("b.txt", "x"), ("a.txt", "y")):
        (tmp_path / name).write_text(content)
        prints.append(urls(tmp_path / name).list_shards("train")[0].hash_files())
    assert prints[0] == prints[1] != prints[2]
    big = bytearray(20 << 20)
    (tmp_path / "big.txt").write_bytes(big)
    before = urls(tmp_path / "big.txt").list_shards("train")[0].hash_files()
    big[100_000] = 1  # between the blocks by which earlier versions knew it
    (tmp_path / "big.txt").write_bytes(big)
    assert urls(tmp_path / "big.txt").list_shards("train")[0].hash_files() != before


def test_stdlib_is_there_without_tests():
    source = StdlibSource()
    train, validation = (source.list_shards(split) for split in ("train", "validation"))
    names = [shard.name for shard in train]
    assert names == sorted(names) and "json/decoder.py" in {*names, *(v.name for v in validation)}
    assert not [name for name in names if "/test/" in f"/{name}" or "/tests/" in f"/{name}"]
    assert not set(names) & {shard.name for shard in validation}
    assert 0.005 < len(validation) / len(train) < 0.05
    assert sum(shard.size for shard in train) > 5_000_000
    text = next(source.read_shard(validation[0]))
    assert isinstance(text, str) and text


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A data set's repository as a local folder, and no network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "hf-cache"))
    folder = tmp_path / "repository"
    (folder / "data").mkdir(parents=True)
    parquet(folder / "data" / "train-00000-of-00001.parquet", text=DOCS)
    parquet(folder / "data" / "validation-00000-of-00001.parquet", text=["held out"])
    return folder


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_hugging_face_data_set_from_a_local_folder(repository, stream):
    source = HfSource(str(repository), stream=stream)
    assert read(source) == DOCS
    assert read(source, "validation") == ["held out"] and source.has_validation()
    before = source.list_shards("train")[0].hash_files()
    parquet(repository / "data" / "train-00000-of-00001.parquet", text=["other"])
    assert source.list_shards("train")[0].hash_files() != before
    assert HfSource(str(repository), splits=["train"]).has_validation() is False
    with pytest.raises(DataError, match="no split 'all', only train, validation"):
        HfSource(str(repository), splits=["all"]).list_shards("train")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_a_data_set_that_cannot_be_had(repository):
    with pytest.raises(Unreachable, match=r"id = .*none - the data set cannot be opened"):
        HfSource(str(repository / "none")).list_shards("train")
    first = next(HfSource(str(repository), text_key="body").read_shard(
        HfSource(str(repository)).list_shards("train")[0]))  # fmt: skip
    assert isinstance(first, BadRecord) and "it has 'text'" in first.reason


def test_token_files(tmp_path):
    np.arange(5, dtype="<u2").tofile(tmp_path / "train.bin")
    folder, files = TokensSource(dir=str(tmp_path)), TokensSource([f"{tmp_path}/*.bin"])
    assert [shard.size for shard in folder.list_shards("train")] == [10]
    assert folder.list_shards("train") == files.list_shards("train")
    assert not folder.has_validation() and not files.has_validation()
    with pytest.raises(Unreachable, match="no such file"):
        TokensSource(dir=str(tmp_path / "none")).list_shards("train")


@pytest.mark.parametrize(
    ("source", "setting"),
    [
        (UrlsSource(), "train_urls"),
        (HfSource(), "id"),
        (HfSource("x", splits=[]), "splits"),
        (TokensSource(), "train_bin"),
        (TokensSource(["a"], dir="b"), "dir"),
    ],
)
def test_problems(source, setting):
    assert [problem.setting for problem in source.problems()] == [setting]
