"""Writing and reading one checkpoint folder: round trip, damage, full disks."""

import errno
import json
import os
import shutil
import threading
import time

import pytest
import safetensors.torch
import torch
from checkpoint_states import small_state

from ostro.checkpoint import State, checkpoint_bytes, load, store, write
from ostro.checkpoint.metadata import parse_metadata, sealed
from ostro.core.errors import CheckpointError


def save(folder, number=7, **fields):
    fields = {"step": number, "is_temporary": False} | fields
    write(folder, small_state(number), **fields)
    return f"{folder}/step-{fields['step']}"


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


def test_round_trip(folder):
    path = save(folder, 7, is_temporary=True, is_best=True, run_id="ab", run_name="tiny run")
    saved, state = load(path), small_state(7)
    for group in ("model", "optimizer", "state"):
        assert_same(saved.tensors(group), state.tensors[group])
    assert saved.values == {"step": 7, "loss": 7.0}
    assert saved.texts == {"config.yaml": "seed: 7\n"}
    marks = saved.metadata
    assert (marks.step, marks.is_temporary, marks.is_best) == (7, True, True)
    assert (marks.run_id, marks.run_name) == ("ab", "tiny run")
    assert saved.groups == ["model", "optimizer", "state"]


def test_every_type_and_shape_is_kept(tmp_path):
    tensors = {
        "f32": torch.randn(4, 3),
        "bf16": torch.randn(3).bfloat16(),
        "f16": torch.randn(3).half(),
        "f64": torch.randn(1, 1, 2).double(),
        "i64": torch.tensor(2**40),
        "i32": torch.tensor([[1], [-2]], dtype=torch.int32),
        "u8": torch.arange(5, dtype=torch.uint8),
        "bool": torch.tensor([True, False, True]),
        "empty": torch.zeros(0, 3),
        "transposed": torch.arange(6.0).reshape(2, 3).T,
        "infinite": torch.tensor([float("inf"), -0.0]),
        "grad": torch.nn.Parameter(torch.ones(2)).data,
    }
    write(str(tmp_path), State({"model": tensors, "none": {}}), step=1, is_temporary=False)
    saved = load(str(tmp_path / "step-1"))
    assert_same(saved.tensors("model"), tensors)
    assert saved.tensors("none") == {}


def test_tied_parameters_are_stored_under_their_own_names(tmp_path):
    weight = torch.randn(4, 2)
    tied = {"embed": weight, "head": weight, "part": weight[1:3]}
    write(str(tmp_path), State({"model": tied}), step=1, is_temporary=False)
    assert_same(load(str(tmp_path / "step-1")).tensors("model"), tied)


def test_files_are_ordinary_safetensors(tmp_path):
    path = save(str(tmp_path))
    found = safetensors.torch.load_file(f"{path}/model.safetensors")
    assert_same(found, small_state(7).tensors["model"])


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    names = {"a": torch.uint8, "b": torch.float64, "c": torch.bfloat16, "d": torch.float32}
    tensors = {name: torch.ones(3, dtype=dtype) for name, dtype in names.items()}
    write(str(tmp_path), State({"model": tensors}), step=1, is_temporary=False)
    data = (tmp_path / "step-1/model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, tensor in tensors.items():
        assert (8 + length + header[name]["data_offsets"][0]) % tensor.element_size() == 0


def test_a_folder_stops_being_a_checkpoint_before_its_files_go(tmp_path, monkeypatch):
    path = save(str(tmp_path))
    seen = []
    monkeypatch.setattr(shutil, "rmtree", lambda path: seen.append(os.path.basename(path)))
    store.filesystem.remove(path)
    assert seen[0].startswith(".tmp-")
    assert not os.path.exists(path)


def test_size_is_known_before_writing(tmp_path):
    state = small_state(3)
    predicted = checkpoint_bytes(state)
    path = save(str(tmp_path), 3)
    actual = sum(os.path.getsize(f"{path}/{name}") for name in os.listdir(path))
    assert abs(predicted - actual) <= 60  # the run's name and the digits of the time


def test_size_needs_no_weights():
    def state(device):
        tensors = {f"layer{i}.weight": torch.empty(300, 200, device=device) for i in range(4)}
        return State({"model": tensors, "optimizer": {"moment": torch.empty(7, device=device)}})

    assert checkpoint_bytes(state("meta")) == checkpoint_bytes(state("cpu"))
    assert checkpoint_bytes(state("meta")) > 4 * 300 * 200 * 4


def test_a_step_saved_again_is_replaced(folder):
    save(folder, 7, is_temporary=True)
    write(folder, small_state(8), step=7, is_temporary=False)
    saved = load(f"{folder}/step-7")
    assert saved.values["step"] == 8
    assert not saved.metadata.is_temporary
    assert store.filesystem.names(folder) == ["step-7"]


def test_loaded_tensors_outlive_the_checkpoint_and_leave_its_files_alone(tmp_path):
    path = save(str(tmp_path))
    weight = load(path).tensors("model")["weight"]
    weight += 1
    assert torch.equal(load(path).tensors("model")["weight"], torch.full((3, 2), 7.0))
    shutil.rmtree(path)
    assert torch.equal(weight, torch.full((3, 2), 8.0))


def test_unknown_group_names_the_known_ones(tmp_path):
    with pytest.raises(CheckpointError, match=r"no 'ema' tensors, only model, optimizer, state"):
        load(save(str(tmp_path))).tensors("ema")


# Damage


def everything(path):
    saved = load(path)
    for group in saved.groups:
        saved.tensors(group)


FILES = ["model.safetensors", "state.safetensors", "values.json", "config.yaml"]


@pytest.mark.parametrize("name", FILES)
def test_truncated_file(tmp_path, name):
    path = save(str(tmp_path))
    os.truncate(f"{path}/{name}", 5)
    with pytest.raises(CheckpointError, match=rf"{name} - is damaged: it has 5 bytes instead of"):
        load(path)


@pytest.mark.parametrize("name", FILES)
def test_flipped_byte(tmp_path, name):
    path = save(str(tmp_path))
    with open(f"{path}/{name}", "r+b") as file:
        data = bytearray(file.read())
        data[-2] ^= 1
        file.seek(0)
        file.write(data)
    with pytest.raises(CheckpointError, match=rf"{name} - is damaged: its content differs"):
        everything(path)
    with pytest.raises(CheckpointError, match=name):
        load(path).verify()


@pytest.mark.parametrize("name", FILES)
def test_missing_file(tmp_path, name):
    path = save(str(tmp_path))
    os.remove(f"{path}/{name}")
    with pytest.raises(CheckpointError, match=rf"{name} - is missing"):
        load(path)


def edited(path, edit):
    with open(f"{path}/metadata.json") as file:
        fields = json.load(file)
    del fields["sha256"]
    edit(fields)
    with open(f"{path}/metadata.json", "w") as file:
        file.write(sealed(fields))


def test_every_bit_of_the_metadata_counts(tmp_path):
    path = save(str(tmp_path))
    data = (tmp_path / "step-7/metadata.json").read_bytes()
    for at in range(len(data)):
        for bit in range(8):
            flipped = bytearray(data)
            flipped[at] ^= 1 << bit
            with pytest.raises(CheckpointError):
                parse_metadata(bytes(flipped), path)


def test_metadata_of_an_older_format_has_no_checksum_of_its_own(tmp_path):
    path = save(str(tmp_path))
    fields = json.loads((tmp_path / "step-7/metadata.json").read_text())
    del fields["sha256"]
    (tmp_path / "step-7/metadata.json").write_text(json.dumps(fields | {"format": 1}))
    assert load(path).step == 7
    (tmp_path / "step-7/metadata.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match="differs from its checksum"):
        load(path)


def with_file(name, **record):
    return lambda fields: fields["files"].update({name: record})


EDITS = {
    "other format": (lambda f: f.update(format=4), "newer ostro"),
    "no format": (lambda f: f.pop("format"), "is not a checkpoint's"),
    "no step": (lambda f: f.pop("step"), "not what ostro writes"),
    "bool step": (lambda f: f.update(step=True), "not what ostro writes"),
    "negative step": (lambda f: f.update(step=-1), "out of range"),
    "nan time": (lambda f: f.update(timestamp=float("nan")), "out of range"),
    "list of files": (lambda f: f.update(files=[]), "not what ostro writes"),
    "no values": (lambda f: f["files"].pop("values.json"), "values.json - is missing"),
    "parent": (with_file("../x", bytes=1, sha256="0" * 64), "not what ostro writes"),
    "absolute": (with_file("/etc/passwd", bytes=1, sha256="0" * 64), "not what ostro writes"),
    "no size": (with_file("x", sha256="0" * 64), "not what ostro writes"),
    "no checksum": (with_file("x", bytes=1), "not what ostro writes"),
    "checksum": (with_file("x", bytes=1, sha256="zz"), "not what ostro writes"),
}


@pytest.mark.parametrize("case", EDITS)
def test_forged_metadata(tmp_path, case):
    edit, message = EDITS[case]
    path = save(str(tmp_path))
    edited(path, edit)
    with pytest.raises(CheckpointError, match=message):
        load(path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"\xff\xfe", b"[" * 100_000, b"{}"])
def test_garbage_metadata(tmp_path, text):
    path = save(str(tmp_path))
    (tmp_path / "step-7/metadata.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"metadata\.json"):
        load(path)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x10",
        b"\xff" * 16,
        (10).to_bytes(8, "little") + b'{"a":{}}  ',
        (2).to_bytes(8, "little") + b"{}",
        (64).to_bytes(8, "little")
        + b'{"a":{"dtype":"F32","shape":[9999],"data_offsets":[0,39996]}}'.ljust(64),
    ],
)
def test_malformed_tensors_with_a_matching_checksum(tmp_path, data):
    """A forged record that fits the file leaves only the reader between us and a crash."""
    path = save(str(tmp_path))
    (tmp_path / "step-7/model.safetensors").write_bytes(data)
    record = store._write_file(str(tmp_path / "x"), data)
    edited(path, with_file("model.safetensors", **vars(record)))
    if data.endswith(b"{}"):
        assert load(path).tensors("model") == {}  # an empty file of tensors is a valid one
    else:
        with pytest.raises(CheckpointError, match=r"model\.safetensors - is not a readable"):
            load(path).tensors("model")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no metadata\.json"):
        load(str(tmp_path))
    with pytest.raises(CheckpointError, match="not found"):
        load(str(tmp_path / "nothing"))
    with pytest.raises(CheckpointError, match="cannot be opened"):
        load("nosuchprotocol://x/step-1")


# Full and refusing disks


def test_too_little_space_is_seen_before_writing(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    state = small_state(7)
    need = checkpoint_bytes(state)
    with pytest.raises(CheckpointError, match=rf"needs .* \({need} bytes\).* 1\.0 KB free"):
        save(str(tmp_path / "run"))
    assert not os.path.exists(tmp_path / "run")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("step", [7, 8])
def test_failure_while_writing_leaves_only_the_older_checkpoint(
    tmp_path, monkeypatch, number, step
):
    path = save(str(tmp_path), 7)
    real, calls = store._write_file, []

    def failing(url, content):
        calls.append(url)
        if len(calls) == 3:
            raise OSError(number, "out of luck")
        return real(url, content)

    monkeypatch.setattr(store, "_write_file", failing)
    with pytest.raises(CheckpointError, match="disk is full" if number == errno.ENOSPC else "luck"):
        write(str(tmp_path), small_state(9), step=step, is_temporary=False)
    assert os.listdir(tmp_path) == ["step-7"]
    assert load(path).values["step"] == 7


def test_files_are_written_at_the_same_time(tmp_path, monkeypatch):
    real, together = store._write_file, threading.Barrier(len(small_state(7).tensors), timeout=30)

    def meeting(url, content):
        if not isinstance(content, bytes):
            together.wait()
        return real(url, content)

    monkeypatch.setattr(store, "_write_file", meeting)
    load(save(str(tmp_path))).verify()


def test_a_file_that_fails_waits_for_the_others(tmp_path, monkeypatch):
    real, ended = store._write_file, []

    def failing(url, content):
        if url.endswith("model.safetensors"):
            raise OSError(errno.EIO, "out of luck")
        time.sleep(0.05)
        ended.append(real(url, content))

    monkeypatch.setattr(store, "_write_file", failing)
    with pytest.raises(CheckpointError, match="out of luck"):
        save(str(tmp_path))
    assert len(ended) == len(small_state(7).tensors) - 1
    assert os.listdir(tmp_path) == []


def test_failed_replacement_on_a_store_puts_the_old_one_back(monkeypatch):
    folder = "memory://failing"
    path = save(folder, 7)

    def failing(url, content):
        raise OSError(errno.EIO, "out of luck")

    monkeypatch.setattr(store, "_write_file", failing)
    with pytest.raises(CheckpointError, match="out of luck"):
        write(folder, small_state(9), step=7, is_temporary=False)
    assert store.filesystem.names(folder) == ["step-7"]
    assert load(path).values["step"] == 7


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(str(tmp_path / "run"))


def test_interrupted_before_anything_was_written_on_a_store(monkeypatch):
    """Ctrl-C while the old checkpoint is being copied aside must not delete it."""
    path = save("memory://interrupted", 7)

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(store.filesystem, "move", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write("memory://interrupted", small_state(9), step=7, is_temporary=False)
    assert load(path).values["step"] == 7
