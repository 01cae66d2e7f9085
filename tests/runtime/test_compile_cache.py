"""Compiled code: kept intact, made again where it is not, and never loaded from others."""

import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ostro.runtime import compile_cache
from ostro.runtime.compile_cache import code_folder, compiled_file

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")


@pytest.fixture
def home(tmp_path, monkeypatch):
    compile_cache._code_folder.cache_clear()
    monkeypatch.setenv("OSTRO_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "compiled"


class Maker:
    """Writes a file and counts how often."""

    def __init__(self, content: bytes = b"code" * 5000):
        self.content, self.count = content, 0

    def __call__(self, path: Path) -> None:
        self.count += 1
        path.write_bytes(self.content)


def read(make: Maker) -> bytes:
    with compiled_file("kernels-x", make) as path:
        return path.read_bytes()


def test_a_file_is_made_once_and_only_this_user_can_write_it(home):
    make, umask = Maker(), os.umask(0)
    try:
        assert read(make) == read(make) == make.content
    finally:
        os.umask(umask)
    (file,) = home.glob("*.so")
    assert make.count == 1
    assert [path.stat().st_mode & 0o77 for path in (home, file)] == [0, 0]


@pytest.mark.parametrize("damage", ["half", "zeros", "empty", "longer"])
def test_a_damaged_file_is_made_again(home, damage, caplog):
    make = Maker()
    read(make)
    (file,) = home.glob("*.so")
    size = len(make.content)
    damaged = {
        "half": make.content[: size // 2],
        "zeros": make.content[:100] + bytes(size - 100),
        "empty": b"",
        "longer": make.content + b"more",
    }[damage]
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING, "ostro"):
        assert read(make) == make.content
    assert make.count == 2 and "compiled again: it is damaged" in caplog.text
    assert read(make) == make.content and make.count == 2


@pytest.mark.parametrize("fault", ["mode", "owner", "link", "pipe", "folder"])
def test_a_file_of_others_is_not_loaded(home, fault, tmp_path, caplog):
    make = Maker()
    read(make)
    (file,) = home.glob("*.so")
    if fault == "mode":
        file.chmod(0o622)
    elif fault == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root gives files away")
        os.chown(file, 65534, -1)
    else:
        file.unlink()
        if fault == "link":  # even to what would be intact
            (tmp_path / "other.so").write_bytes(make.content)
            file.symlink_to(tmp_path / "other.so")
        elif fault == "pipe":
            os.mkfifo(file)
        else:
            file.mkdir()
    if fault == "folder":
        with pytest.raises(OSError):
            read(make)
        return
    with caplog.at_level(logging.WARNING, "ostro"):
        assert read(make) == make.content
    assert make.count == 2 and f"{file} is compiled again" in caplog.text
    assert not (tmp_path / "other.so").exists() or not file.is_symlink()


@pytest.mark.parametrize("fault", ["mode", "group", "owner", "file", "missing"])
def test_without_a_folder_of_its_own_a_process_takes_a_temporary_one(
    home, fault, caplog, monkeypatch
):
    make = Maker()
    if fault in ("mode", "group", "owner"):
        read(make)
    if fault == "mode":
        home.chmod(0o777)
    elif fault == "group":
        home.chmod(0o775)
    elif fault == "owner":
        if os.geteuid() != 0:
            pytest.skip("only root gives folders away")
        os.chown(home, 65534, -1)
    elif fault == "file":
        home.parent.write_text("")
    else:
        monkeypatch.setenv("OSTRO_CACHE_HOME", "/proc/none")
    compile_cache._code_folder.cache_clear()
    planted = list(home.glob("*.so")) if home.parent.is_dir() else []
    for file in planted:
        file.write_bytes(b"planted")
    with caplog.at_level(logging.WARNING, "ostro"):
        assert read(make) == make.content
    folder = code_folder()
    assert folder != home and folder.stat().st_mode & 0o77 == 0
    assert len(caplog.records) == 1 and "set OSTRO_CACHE_HOME" in caplog.text
    assert [file.read_bytes() for file in planted] == [b"planted"] * len(planted)
    shutil.rmtree(folder)
    compile_cache._code_folder.cache_clear()


PROGRAM = """
import pathlib, sys, time
from ostro.runtime.compile_cache import compiled_file

def make(path):
    with open("made", "a") as file:
        file.write("x")
    path.write_bytes(b"half")
    time.sleep(float(sys.argv[1]))
    path.write_bytes(b"whole")

with compiled_file("kernels-x", make) as path:
    assert path.read_bytes() == b"whole"
"""


def start(folder: Path, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", PROGRAM, str(seconds)]
    return subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)


def test_of_several_processes_one_makes_it(home, tmp_path):
    processes = [start(tmp_path, 0.5) for _ in range(4)]
    assert [(process.communicate()[1], process.returncode) for process in processes] == [
        ("", 0)
    ] * 4
    assert (tmp_path / "made").read_text() == "x"
    assert sorted(path.suffix for path in home.iterdir()) == [".lock", ".so"]


def test_what_a_killed_process_leaves_is_in_nobodys_way(home, tmp_path):
    killed = start(tmp_path, 60)
    while not (tmp_path / "made").exists():
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    again = start(tmp_path, 0)
    assert (again.communicate()[1], again.returncode) == ("", 0)
    assert sorted(path.suffix for path in home.iterdir()) == [".lock", ".so"]


KERNELS = """
import pathlib
from ostro import kernels
from ostro.runtime import compile_cache

pathlib.Path("kernels.cpp").write_text('extern "C" int seven() { return 7; }')
kernels._sources = lambda: [pathlib.Path("kernels.cpp")]
kernels._FLAGS = "-shared -fPIC"
kernels.torch.cpu._is_avx512_bf16_supported = lambda: True
kernels.platform.machine = lambda: "x86_64"
"""


def kernels(folder: Path, program: str) -> str:
    """What a program prints that has kernels which any processor runs."""
    command = [sys.executable, "-c", KERNELS + program]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@needs_compiler
def test_damaged_kernels_are_compiled_again(home, tmp_path):
    assert kernels(tmp_path, "print(kernels._library().seven())") == "7\n"
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:4096] + bytes(9999)):
        (file,) = home.glob("*.so")
        file.write_bytes(damage(file.read_bytes()))
        assert kernels(tmp_path, "print(kernels._library().seven())") == "7\n"


@needs_compiler
def test_a_run_goes_without_kernels_that_cannot_be_kept(home, tmp_path):
    program = "def full(*_): raise OSError(28, 'No space left')\ncompile_cache._make = full\n"
    assert "No space left" in kernels(tmp_path, program + "print(kernels.unavailable_reason())")
    assert "torch" in kernels(tmp_path, program + "print(kernels.active_kind())")


@pytest.mark.parametrize("name", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"])
def test_a_folder_that_torch_cannot_make_is_named_and_replaced(name, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    compile_cache.unusable_cache.cache_clear()
    monkeypatch.setenv(name, str(tmp_path / "file" / "cache"))
    fault = compile_cache.unusable_cache()
    assert fault and f"{name} = {tmp_path}/file/cache cannot be written to" in fault
    assert os.path.isdir(os.environ[name])
    compile_cache.unusable_cache.cache_clear()
    assert compile_cache.unusable_cache() is None
