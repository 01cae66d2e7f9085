"""Folders for checkpoints: on the disk, and in memory as a stand-in for an object store."""

import itertools

import fsspec
import pytest

_counter = itertools.count()


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """A run's folder that does not exist yet, as a path or an fsspec URL."""
    if request.param == "local":
        yield str(tmp_path / "run")
    else:
        url = f"memory://run-{next(_counter)}"
        yield url
        fs, path = fsspec.url_to_fs(url)
        if fs.exists(path):
            fs.rm(path, recursive=True)
