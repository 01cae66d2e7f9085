"""The log of a run: lost lines stop nothing."""

import logging
import os
import threading
from pathlib import Path

import pytest
from tiny_run import ostro, write_config

from ostro.runtime.entry_point import entry_point
from ostro.runtime.run_log import folder_fault, logging_to

log = logging.getLogger("ostro.test")


def test_a_log_that_cannot_be_written_warns_once_and_is_tried_again(tmp_path, capsys, monkeypatch):
    path = tmp_path / "train.log"
    with logging_to(path):
        log.info("before")
        (handler,) = [h for h in logging.getLogger("ostro").handlers if hasattr(h, "baseFilename")]
        handler._let_go()
        monkeypatch.setattr(handler, "baseFilename", "/dev/full")
        for _ in range(300):
            log.info("meanwhile " * 20)
        monkeypatch.setattr(handler, "baseFilename", str(path))
        log.info("after")
    said = capsys.readouterr()
    assert said.err == "" and said.out.count("cannot be written to: [Errno 28]") == 1
    lines = [line.rpartition(" ")[2] for line in path.read_text().splitlines()]
    assert lines[0] == "before" and lines[-1] == "after"


def test_why_a_folder_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("")
    assert folder_fault(tmp_path / "new" / "folder") == ""
    assert os.listdir(tmp_path / "new" / "folder") == []
    assert folder_fault(tmp_path / "file" / "below") == "Not a directory"
    assert folder_fault(Path("/proc/none")) != ""


@pytest.mark.cli
def test_an_unusable_log_dir_is_named_before_anything_is_trained(tmp_path):
    config = write_config(tmp_path)
    for folder, rule in ((f"{config}/x", "cannot be written to"), ("", "must name a folder")):
        done = ostro("train", "--config_path", config, "--trainer.log_dir", folder, cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert f"trainer.log_dir = {folder}" in done.stderr and rule in done.stderr
    assert not (tmp_path / "checkpoints").exists()


def test_a_thread_that_hands_its_error_on_prints_no_traceback(capsys):
    class Writer(threading.Thread):
        exception: Exception | None = None

        def run(self) -> None:
            try:
                raise OSError("disk full")
            except OSError as error:
                self.exception = error if self.name == "handed on" else None
                raise

    def command(_):
        for name in ("handed on", "lost"):
            thread = Writer(name=name)
            thread.start()
            thread.join()

    assert entry_point(command) == 0
    assert capsys.readouterr().err.count("OSError: disk full") == 1
