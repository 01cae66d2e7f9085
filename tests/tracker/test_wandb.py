"""wandb: the arguments it gets, and the files of a real offline run."""

import logging
import math
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ostro.cli.arguments import load_run
from ostro.tracker import RunInfo, WandbConfig, build_trackers
from ostro.tracker.wandb import code_folder, tracked_files


class FakeRun:
    """A wandb run that remembers."""

    def __init__(self, id: str):
        self.id = id
        self.logged: list[tuple[dict, int]] = []
        self.artifacts: list[tuple[str, str, str]] = []
        self.summary: dict[str, Any] = {}
        self.finished = 0

    def log(self, metrics, step):
        self.logged.append((metrics, step))

    def log_artifact(self, path, name=None, type=None):
        if name is None:  # an Artifact
            self.artifacts.append((path.name, path.type, ",".join(sorted(path.files))))
        else:
            text = Path(path).read_text() if Path(path).is_file() else path
            self.artifacts.append((name, type, text))

    def finish(self):
        self.finished += 1


class FakeWandb:
    """Records `init`; `login` and `online` say what the world outside is like."""

    class Error(Exception):
        pass

    class Settings:
        model_fields = ("init_timeout", "finish_timeout")

    class Artifact:
        def __init__(self, name, type):
            self.name, self.type, self.files = name, type, {}

        def add_file(self, path, name):
            self.files[name] = Path(path).read_bytes()

    def __init__(self):
        self.settings = SimpleNamespace(
            mode="online", api_key="k" * 40, base_url="https://api.wandb.ai"
        )
        self.calls: list[dict[str, Any]] = []
        self.unreachable = False

    def setup(self):
        return SimpleNamespace(settings=self.settings)

    def init(self, **arguments):
        self.calls.append(arguments)
        if self.unreachable and arguments.get("mode") != "offline":
            raise self.Error("timed out")
        self.run = FakeRun(arguments["id"])
        return self.run


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A recorded wandb, in a working directory and an environment without settings."""
    for name in list(os.environ):
        if name.startswith(("WANDB_", "TORCH_TRACE", "TORCH_COMPILE_DEBUG_DIR")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    module = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


RUN = RunInfo("run1", config={"model": {"type": "gpt2"}, "seed": 0})
BOUNDS = {"init_timeout": 60, "finish_timeout": 300}


def test_unset_fields_are_left_out(fake):
    WandbConfig(save_code=False).build(RUN)
    assert fake.calls == [{"id": "run1", "config": RUN.config, "settings": BOUNDS}]


def test_set_fields_are_passed_verbatim(fake):
    fields = {
        "entity": "team",
        "project": "p",
        "name": "first try",
        "tags": ["a", "b"],
        "id": "own",
        "group": "g",
        "mode": "online",
        "resume": "must",
    }
    tracker = WandbConfig(**fields, save_code=False).build(RUN)
    assert fake.calls == [fields | {"config": RUN.config, "settings": BOUNDS}]
    assert tracker.state() == {"id": "own"}
    WandbConfig(resume=False, save_code=False).build(RUN)
    assert fake.calls[1]["resume"] is False


def test_flags_of_the_command_line_reach_init(fake, tmp_path):
    """The settings of `--trainer.wandb.*` over a file with two trackers."""
    path = tmp_path / "run.yaml"
    path.write_text(
        "data: {source: stdlib}\n"
        "trainer: {tracker: [{type: wandb, project: old, save_code: false}, {type: noop}]}\n"
    )
    words = ["project my_project", "name my_run", "id asdf1234", "group my_group", "resume True"]
    flags = [part for word in words for part in f"--trainer.wandb.{word}".split()]
    config = load_run(str(path), flags).config
    build_trackers(config.trainer.tracker, RUN)
    (call,) = fake.calls
    assert {key: call[key] for key in ("project", "name", "id", "group", "resume")} == {
        "project": "my_project", "name": "my_run", "id": "asdf1234", "group": "my_group",
        "resume": True,
    }  # fmt: skip


def test_a_resumed_run_is_continued(fake):
    WandbConfig(save_code=False).build(RunInfo("run1", resume=True, start_step=5))
    assert fake.calls[0]["resume"] == "allow"
    WandbConfig(save_code=False, resume="never").build(RunInfo("run1", resume=True))
    assert fake.calls[1]["resume"] == "never"


def test_the_environment_may_set_the_time_limits(fake, monkeypatch):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "5")
    WandbConfig(save_code=False).build(RUN)
    assert fake.calls[0]["settings"] == {"finish_timeout": 300}


def test_without_a_login_the_run_is_offline(fake, caplog, monkeypatch, tmp_path):
    fake.settings.api_key = None
    WandbConfig(save_code=False).build(RUN)
    assert fake.calls[-1]["mode"] == "offline"
    assert [record.getMessage() for record in caplog.records] == [
        "no wandb login (`wandb login` makes one): the run is tracked offline"
    ]

    def mode_of(config: WandbConfig) -> str | None:
        config.build(RUN)
        return fake.calls[-1].get("mode")

    assert mode_of(WandbConfig(mode="online", save_code=False)) == "online", "as asked"
    fake.settings.mode = "disabled"  # WANDB_MODE or wandb's own settings file
    assert mode_of(WandbConfig(save_code=False)) is None
    fake.settings.mode = "online"
    (tmp_path / "netrc").write_text("machine other.org login x password y\n")
    assert mode_of(WandbConfig(save_code=False)) == "offline"
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password key\n")
    assert mode_of(WandbConfig(save_code=False)) is None
    (tmp_path / "netrc").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert mode_of(WandbConfig(save_code=False)) is None


def test_an_unreachable_server_means_offline(fake, caplog):
    fake.unreachable = True
    tracker = WandbConfig(save_code=False, project="p").build(RUN)
    assert [call.get("mode") for call in fake.calls] == [None, "offline"]
    assert fake.calls[1]["project"] == "p"
    assert "wandb cannot start online (timed out)" in caplog.text
    tracker.log({"train/loss": 1.0}, 0)
    assert fake.run.logged == [({"train/loss": 1.0}, 0)]


def test_everything_reaches_the_run(fake):
    tracker = WandbConfig(save_code=False).build(RUN)
    tracker.log({"train/loss": math.inf}, 3)
    tracker.log_summary({"parameter_count": 5})
    tracker.finish()
    run = fake.run
    assert run.logged == [({"train/loss": math.inf}, 3)]
    assert run.summary == {"parameter_count": 5}
    assert run.finished == 1
    assert run.artifacts == [("config.yaml", "config", "model:\n  type: gpt2\nseed: 0\n")]


def git(folder: Path, *command: str) -> None:
    subprocess.run(["git", "-C", str(folder), *command], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """A repository with tracked, untracked, ignored and deleted files."""
    root = tmp_path / "repository"
    (root / "scripts").mkdir(parents=True)
    git(root, "init")
    for name in ("a.py", "scripts/train.py", "scripts/größe.txt", "gone.py"):
        (root / name).write_text("x")
    git(root, "add", ".")
    (root / "gone.py").unlink()
    (root / "untracked.bin").write_text("x")
    return root


FILES = "a.py,scripts/größe.txt,scripts/train.py"


def test_code_of_the_main_script(fake, repository, monkeypatch):
    script = str(repository / "scripts" / "train.py")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", script, raising=False)
    WandbConfig().build(RUN)
    assert fake.run.artifacts[1:] == [("code-run1", "code", FILES)]


def test_code_of_the_working_directory_if_the_script_is_elsewhere(
    fake, repository, monkeypatch, tmp_path, caplog
):
    script = str(tmp_path / "bin" / "ostro")
    monkeypatch.setattr(sys.modules["__main__"], "__file__", script, raising=False)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    caplog.set_level(logging.INFO)
    WandbConfig().build(RUN)
    assert len(fake.run.artifacts) == 1
    assert "no code is uploaded" in caplog.text
    monkeypatch.chdir(repository / "scripts")
    assert code_folder() == repository.resolve()


def test_code_of_a_folder(fake, repository):
    WandbConfig(save_code=str(repository / "scripts")).build(RUN)
    assert fake.run.artifacts[1] == ("code-run1", "code", "größe.txt,train.py")


def test_code_of_a_folder_without_git(fake, tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "plain" / "sub").mkdir(parents=True)
    (tmp_path / "plain" / "sub" / "x.py").write_text("x")
    assert tracked_files(tmp_path / "plain") == ["sub/x.py"]


@pytest.mark.parametrize("variable", ["TORCH_TRACE", "TORCH_COMPILE_DEBUG_DIR"])
def test_compiler_dumps_are_uploaded_at_the_end(fake, monkeypatch, tmp_path, variable, caplog):
    monkeypatch.setenv(variable, str(tmp_path / "dumps"))
    tracker = WandbConfig(save_code=False, save_compile_dumps=True).build(RUN)
    (tmp_path / "dumps").mkdir()  # the compiler makes it later
    tracker.finish()
    dumps = ("compile-dumps-run1", "compile_dumps", str(tmp_path / "dumps"))
    assert fake.run.artifacts[1:] == [dumps]
    assert fake.run.finished == 1
    assert not caplog.records


def test_compiler_dumps_without_a_folder_warn_once(fake, caplog):
    tracker = WandbConfig(save_code=False, save_compile_dumps=True).build(RUN)
    tracker.finish()
    (record,) = caplog.records
    assert "TORCH_TRACE or TORCH_COMPILE_DEBUG_DIR" in record.getMessage()
    assert len(fake.run.artifacts) == 1


def test_a_wrong_resume_is_refused():
    (problem,) = WandbConfig(resume="alow").problems()
    assert problem.setting == "resume"
    assert problem.advice == "did you mean allow?"
    for good in (None, True, False, "allow", "must"):
        assert not list(WandbConfig(resume=good).problems())


OFFLINE_RUN = """
import math
from ostro.tracker import RunInfo, WandbConfig, build_trackers

config = WandbConfig(project="proj", tags=["t1"], save_code="code")
tracker = build_trackers(config, RunInfo("run1", config={"model": {"type": "gpt2"}}))
tracker.log({"train/loss": 3.5}, 0)
tracker.log({"train/loss": math.nan}, 1)
tracker.log_text("sample", "a < b", 1)
tracker.log_summary({"parameter_count": 5})
tracker.finish()
"""


def read_records(path: Path) -> list[Any]:
    """The records of a .wandb file: protocol buffers in the blocks of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part, records = path.read_bytes(), 7, b"", []
    while position + 7 <= len(data):
        room = 32768 - position % 32768
        if room < 7:
            position += room
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(Record.FromString(part))
            part = b""
    return records


def test_files_of_an_offline_run(tmp_path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "model.py").write_text("x = 1\n")
    environment = {key: value for key, value in os.environ.items() if "WANDB" not in key}
    environment |= {
        "HOME": str(tmp_path),  # so no login
        "WANDB_SILENT": "true",
        "WANDB__DISABLE_STATS": "true",
    }
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE_RUN],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert "no wandb login" in done.stderr
    (path,) = tmp_path.glob("wandb/offline-run-*/run-run1.wandb")
    records = read_records(path)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.run_id, run.project, list(run.tags)) == ("run1", "proj", ["t1"])
    config = {item.key: item.value_json for item in run.config.update}
    assert config["model"] == '{"type":"gpt2"}'
    history = [
        {"/".join(item.nested_key): item.value_json for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    assert [(row["_step"], row["train/loss"]) for row in history] == [("0", "3.5"), ("1", "NaN")]
    artifacts = {
        record.artifact.name: [entry.path for entry in record.artifact.manifest.contents]
        for record in records
        if record.HasField("artifact")
    }
    assert artifacts == {"config.yaml": ["config.yaml"], "code-run1": ["model.py"]}
    summary = [item for record in records for item in record.summary.update]
    assert "5" in [item.value_json for item in summary if item.key == "parameter_count"]
    (page,) = path.parent.glob("files/media/html/sample*.html")
    assert page.read_text() == "<pre>a &lt; b</pre>"
