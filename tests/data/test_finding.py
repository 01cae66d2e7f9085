"""Finding files by patterns: literal names, twins, and time that grows with their number only."""

import os

import pytest

from ostro.core.errors import DataError
from ostro.data.sources.files import find_files, guess_format, list_files
from ostro.data.sources.source import UrlsSource

NAMES = ["what?.txt", "std::vector.txt", "a#b.txt", "[1].txt", "{1..3}.txt", "a*b.txt", "50%.txt"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_file_that_exists_is_found_under_its_literal_name(tmp_path, name, scheme):
    (tmp_path / name).write_text("itself")
    (tmp_path / "aXb.txt").write_text("what the name would match as a pattern")
    source = UrlsSource([f"{scheme}{tmp_path}/{name}"])
    (shard,) = source.list_shards("train")
    assert list(source.read_shard(shard)) == ["itself"]


@pytest.mark.parametrize("folder", ["[data]", "{a,b}", "what?", "x::y"])
def test_folders_that_exist_are_literal_and_the_rest_is_a_pattern(tmp_path, folder):
    (tmp_path / folder).mkdir()
    for name in ("1.txt", "2.txt", "3.txt"):
        (tmp_path / folder / name).write_text("x")
    found = find_files([f"{tmp_path}/{folder}/{{1..2}}.txt"], "x")
    assert [os.path.basename(path) for path in found] == ["1.txt", "2.txt"]
    assert len(find_files([f"{tmp_path}/{folder}/*.txt"], "x")) == 3


@pytest.mark.parametrize(
    "spelling", ["a.txt", "./a.txt", "link.txt", "hard.txt", "file://{}/a.txt"]
)
def test_one_file_under_two_spellings_is_listed_twice(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("x")
    (tmp_path / "link.txt").symlink_to("a.txt")
    os.link("a.txt", "hard.txt")
    with pytest.raises(DataError, match="listed twice"):
        find_files([f"{tmp_path}/a.txt", spelling.format(tmp_path)], "x")
    (tmp_path / "empty.txt").touch()
    os.link("empty.txt", "nothing.txt")
    assert len(find_files(["empty.txt", "nothing.txt"], "x")) == 2


def test_what_is_no_file_is_said(tmp_path):
    (tmp_path / "gone.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    for name, what in (("gone.txt", "a link to a file that does not exist"),
                       ("pipe.txt", "is not a regular file"), ("a\0b", "null")):  # fmt: skip
        with pytest.raises(DataError, match=what):
            find_files([f"{tmp_path}/{name}"], "x")


def test_many_mistakes_are_counted_not_all_listed():
    with pytest.raises(DataError, match=r"300 of its files(.|\n)*and 280 more$"):
        find_files(["/nowhere/{1..300}.txt"], "x")


def test_listing_reads_no_file_and_looks_at_each_once(tmp_path, monkeypatch):
    for index in range(50):
        (tmp_path / f"{index}.txt").write_text("x")
    looked = []
    stat = os.stat
    monkeypatch.setattr(os, "stat", lambda path, **k: looked.append(path) or stat(path, **k))
    monkeypatch.setattr("builtins.open", None)
    shards = list_files([f"{tmp_path}/*.txt"], "x")
    assert len(shards) == 50 and all(shard.fingerprint == "" for shard in shards)
    assert len([path for path in looked if str(path).endswith(".txt")]) <= 52


@pytest.mark.parametrize(
    ("name", "format"),
    [("a.jl", "jsonl"), ("a.ndjson", "jsonl"), ("a.jsonlines.gz", "jsonl"), ("A.JL", "jsonl"),
     ("https://x.org/a.jsonl.gz?download=1#top", "jsonl"), ("what?.jsonl", "jsonl"),
     ("s3://b/what?.jsonl", "jsonl"), ("s3://b/a.jsonl?versionId=x.y", "jsonl"),
     ("zip://a.jsonl::s3://b/c.zip", "jsonl"), ("simplecache::s3://b/a.txt", "text"),
     ("a.ipynb", "text"), ("a.html", "text"), ("a.xml", "text"), ("a.rs", "text"),
     ("a.zip", "auto"), ("a.jsonl.zip", "auto"), ("a.tar.zst", "auto"), ("a.tgz", "auto")],
)  # fmt: skip
def test_formats_by_name(name, format):
    assert guess_format(name) == format


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.npy", "a.pdf", "README", "a.gz"])
def test_what_is_not_known_is_refused(tmp_path, name):
    (tmp_path / name).write_text("id,text\n1,x\n")
    source = UrlsSource([f"{tmp_path}/{name}"])
    with pytest.raises(DataError, match=r"nothing is known about .* set format to one of"):
        source.list_shards("train")
    assert guess_format(name, "text") == "text"


def test_a_table_is_sent_elsewhere():
    with pytest.raises(DataError, match="convert it to JSON lines or parquet"):
        guess_format("a.csv.zst")


def test_a_file_may_have_a_reference_in_its_name(tmp_path):
    path = tmp_path / "a${NOT_SET_ANYWHERE}.txt"
    path.write_text("itself")
    source = UrlsSource([str(tmp_path / "*.txt")])
    (shard,) = source.list_shards("train")
    assert (shard.name, list(source.read_shard(shard))) == (str(path), ["itself"])
