"""Archives of files: every member is read, or the archive is refused."""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile

import pytest
import zstandard

from ostro.core.errors import DataError
from ostro.data.sources.files import BadRecord
from ostro.data.sources.source import UrlsSource

MEMBERS = {
    "b/two.jsonl": b'{"text": "3"}\n{"text": "4"}\n',
    "a.jsonl.gz": gzip.compress(b'{"text": "1"}\n') + gzip.compress(b'{"text": "2"}\n'),
    "c.txt": b"5",
    "__MACOSX/._c.txt": b"litter",
    "b/.DS_Store": b"litter",
}


def lines(*texts):
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def zipped(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("b")
        for name, content in members.items():
            archive.writestr(name, content)
    return str(path)


def tarred(members, format=tarfile.PAX_FORMAT):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as archive:
        folder = tarfile.TarInfo("b")
        folder.type = tarfile.DIRTYPE
        archive.addfile(folder)
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def read(path, **options):
    source = UrlsSource([str(path)], **options)
    return [text for shard in source.list_shards("train") for text in source.read_shard(shard)]


def test_all_members_of_a_zip_are_read_by_name(tmp_path):
    assert read(zipped(tmp_path / "d.zip", MEMBERS)) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("name", "pack"),
    [("d.tar", bytes), ("d.tar.gz", gzip.compress), ("d.tgz", gzip.compress),
     ("d.tar.zst", zstandard.compress), ("d.tar.bz2", bz2.compress), ("d.txz", lzma.compress)],
)  # fmt: skip
def test_all_members_of_a_tar_are_read_in_its_order(tmp_path, name, pack):
    (tmp_path / name).write_bytes(pack(tarred(MEMBERS)))
    assert read(tmp_path / name) == ["3", "4", "1", "2", "5"]


def test_members_without_a_known_suffix_have_the_format_of_the_archive(tmp_path):
    members = {"part-0": lines("a"), "part-1": lines("b")}
    assert read(zipped(tmp_path / "d.jsonl.zip", members)) == ["a", "b"]
    (tmp_path / "d.jsonl.tar.gz").write_bytes(gzip.compress(tarred(members)))
    assert read(tmp_path / "d.jsonl.tar.gz") == ["a", "b"]
    assert read(zipped(tmp_path / "d.zip", members), format="jsonl") == ["a", "b"]


@pytest.mark.parametrize(
    ("members", "rule"),
    [
        ({"a.jsonl": lines("x"), "b.csv": b"1"}, "d.zip, b.csv - nothing is known"),
        ({"a.jsonl": lines("x"), "LICENSE": b"1"}, "d.zip, LICENSE - nothing is known"),
        ({"a.jsonl": lines("x"), "b.tar": b"1"}, "holds the archive b.tar"),
        ({}, "the archive holds no files"),
        ({"__MACOSX/a": b""}, "the archive holds no files"),
    ],
)
def test_what_is_not_read_whole_is_refused(tmp_path, members, rule):
    with pytest.raises(DataError, match=rule):
        read(zipped(tmp_path / "d.zip", members))
    (tmp_path / "d.tar").write_bytes(tarred(members))
    with pytest.raises(DataError, match=rule.replace("d.zip", "d.tar")):
        read(tmp_path / "d.tar")


def test_bad_records_name_their_member(tmp_path):
    members = {"a.jsonl": lines("x"), "b.jsonl": lines("y") + b"{\n" + lines("z")}
    bad = read(zipped(tmp_path / "d.zip", members))[2]
    assert isinstance(bad, BadRecord) and bad.where == "b.jsonl, line 2"


def test_damaged_archives_are_refused(tmp_path):
    content = tarred({"a.txt": b"first " * 200, "b.txt": b"second " * 200})
    for stop in (1536, 2560, 3000, 4608):  # within and behind members and their headers
        (tmp_path / "d.tar").write_bytes(content[:stop])
        with pytest.raises(DataError, match=r"d\.tar - cannot be read to its end"):
            read(tmp_path / "d.tar")
    path = zipped(tmp_path / "d.zip", {"a.txt": b"content " * 100})
    data = bytearray((tmp_path / "d.zip").read_bytes())
    for damaged in (data[:-30], data[:60] + b"\xff\xff" + data[62:]):
        (tmp_path / "d.zip").write_bytes(damaged)
        with pytest.raises(DataError, match=r"d\.zip - cannot be read to its end"):
            read(path)


def test_a_bomb_is_not_unpacked(tmp_path):
    with pytest.raises(DataError, match="1000 times its own size"):
        read(zipped(tmp_path / "d.zip", {"a.txt": bytes(1 << 27)}))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstandard.compress])
def test_all_streams_of_a_file_are_read(tmp_path, pack):
    suffix = {"gzip": "gz", "bz2": "bz2", "lzma": "xz"}.get(pack.__module__, "zst")
    path = tmp_path / f"a.jsonl.{suffix}"
    path.write_bytes(b"".join(pack(lines(str(index))) for index in range(3)))
    assert read(path) == ["0", "1", "2"]
