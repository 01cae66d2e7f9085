"""Checkpoints that somebody made to fill the memory, keep the processor, or lead elsewhere."""

import hashlib
import io
import itertools
import json
import os
import pickle
import random
import struct
import time
import zipfile

import pytest
import safetensors.torch
import torch
from checkpoint_states import small_state

from ostro.checkpoint import load, read_settings, write
from ostro.checkpoint.metadata import sealed
from ostro.checkpoint.single_file import load_file
from ostro.checkpoint.tiling import tiles
from ostro.core.errors import CheckpointError
from ostro.io.torch_files import read_file

CONTENT = {
    "format": "ostro",
    "model": {"w": torch.arange(6.0).view(2, 3)},
    "values": {"step": 5},
    "texts": {},
}


def repacked(tmp_path, change, content=CONTENT, compression=zipfile.ZIP_STORED):
    """A file of torch.save whose records `change(name, data)` has replaced; more may follow."""
    stream, path = io.BytesIO(), tmp_path / "step_5.pt"
    torch.save(content, stream)
    with zipfile.ZipFile(stream) as old, zipfile.ZipFile(path, "w", compression) as new:
        for name in old.namelist():
            for to, data in change(name, old.read(name)):
                new.writestr(to, data)
    return path


def _pickle(data):
    return lambda name, old: [(name, data if name.endswith("data.pkl") else old)]


def _replace(old, new):
    def change(name, data):
        is_pickle = name.endswith("data.pkl")
        assert not is_pickle or old in data
        return [(name, data.replace(old, new) if is_pickle else data)]

    return change


def _call(name, argument):
    """A pickle that calls `name` with one number."""
    module, _, name = name.rpartition(".")
    length = struct.pack("<q", argument)
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"\x8a\x08" + length + b"\x85R."


def _rows(name, data):
    """A stride of 0 makes any number of rows of one."""
    size, stride = b"K\x02K\x03\x86", b"K\x03K\x01\x86"
    assert not name.endswith("data.pkl") or (size in data and stride in data)
    return [(name, data.replace(size, HUGE + size[2:]).replace(stride, b"K\x00" + stride[2:]))]


def _doubled(times):
    inner = [b"]q%c(h%ch%ce" % (i, i - 1, i - 1) for i in range(1, times)]
    return b"\x80\x02]q\x00" + b"".join(inner) + b"."


HUGE = b"\x8a\x05" + (1 << 33).to_bytes(5, "little")
ARCHIVES = {
    "more than in the record": _replace(b"K\x06t", HUGE + b"t"),
    "a view larger than its storage": _replace(b"K\x02K\x03\x86", b"K\x02" + HUGE + b"\x86"),
    "one row a billion times": _rows,
    "an offset behind the end": _replace(b"QK\x00K\x02", b"QK\x05K\x02"),
    "a negative stride": _replace(b"K\x03K\x01\x86", b"J\xff\xff\xff\xffK\x01\x86"),
    "a bytearray of a terabyte": _pickle(_call("builtins.bytearray", 1 << 40)),
    "a storage of a terabyte": _pickle(_call("torch.storage.UntypedStorage", 1 << 40)),
    "a tensor of a terabyte": _pickle(_call("torch.Tensor", 1 << 40)),
    "a tensor without storage": _pickle(_call("torch._utils._rebuild_meta_tensor_no_storage", 1)),
    "code": _pickle(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R."),
    "a slow encoding": _pickle(
        b"\x80\x02c_codecs\nencode\nX\x01\x00\x00\x00xX\x08\x00\x00\x00punycode\x86R."
    ),
    "an exponential list": _pickle(_doubled(60)),
    "a member twice": lambda name, data: [(name, data)] * (2 if name.endswith("data.pkl") else 1),
    "a second folder": lambda name, data: [(name, data), (f"other/{name}", data)],
    "an absolute name": lambda name, data: [(f"/{name}", data)],
    "a name that leads out": lambda name, data: [(name, data), ("archive/../../x", b"")],
    "no pickle": lambda name, data: [] if name.endswith("data.pkl") else [(name, data)],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("change", ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_does_not_add_up_is_refused(tmp_path, change, check):
    path, start = repacked(tmp_path, change), time.process_time()
    with pytest.raises(CheckpointError, match=r"step_5\.pt"):
        read_file(path, check=check)
    assert time.process_time() - start < 5


def test_a_compressed_archive_is_refused(tmp_path):
    path = repacked(tmp_path, lambda name, data: [(name, data)], compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(CheckpointError, match="compressed"):
        read_file(path)


def test_records_that_lie_over_each_other_are_refused(tmp_path):
    """The directory of a zip file may name one record many times: a bomb without compression."""
    path = tmp_path / "step_5.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}, 2))
        archive.writestr("a/data/0", bytes(100_000))
        info = archive.getinfo("a/data/0")
        for number in range(1, 20):
            again = zipfile.ZipInfo(f"a/data/{number}")
            for name in ("CRC", "compress_size", "file_size", "header_offset"):
                setattr(again, name, getattr(info, name))
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive._didModify = True
    with pytest.raises(CheckpointError, match="larger than the file"):
        read_file(path)


def test_tensors_that_share_too_much_are_refused(tmp_path):
    weight = torch.zeros(100, 1000)
    named = {f"w{number}": weight.view(1000, 100) for number in range(100)}
    torch.save(CONTENT | {"model": named}, tmp_path / "step_5.pt")
    with pytest.raises(CheckpointError, match="larger than the file"):
        read_file(tmp_path / "step_5.pt")


def test_what_torch_saves_of_a_training_run_is_read(tmp_path):
    model = torch.nn.Sequential(torch.nn.Embedding(8, 4), torch.nn.Linear(4, 8, bias=False))
    model[1].weight = model[0].weight
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95))
    model(torch.arange(3)).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "model_args": {"n_layer": 1, "bias": False},
        "iter_num": 5,
        "best_val_loss": torch.tensor(1.5),
        "config": {"dtype": "bfloat16", "names": ["a", ("b", 1)], "none": None},
        "more": [torch.zeros(3, 4).t(), torch.arange(10)[3:5], torch.zeros(0), torch.tensor(1)],
        "kinds": [
            torch.zeros(2, dtype=kind) for kind in (torch.uint16, torch.bfloat16, torch.bool)
        ],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "rest": [torch.Size([1]), torch.device("cpu"), torch.float32, {1, 2}, b"\xff"],
    }
    torch.save(content, tmp_path / "ckpt.pt")
    found = read_file(tmp_path / "ckpt.pt")
    assert found.keys() == content.keys()
    assert found["rest"] == content["rest"]
    for name, tensor in content["model"].items():
        assert torch.equal(found["model"][name], tensor)
    assert found["optimizer"]["param_groups"] == content["optimizer"]["param_groups"]
    torch.save(CONTENT, tmp_path / "step_5.pt")
    assert load_file(tmp_path / "step_5.pt").step == 4


def bomb(levels):
    lines = [f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, levels)]
    return "b0: &b0 [x, x]\n" + "".join(lines)


@pytest.mark.parametrize(
    "more",
    [
        bomb(60),
        "a: &a {b: 1}\nc: {<<: [*a, *a]}\n",
        "a: &a [*a]\n",
        f"a: {'[' * 3000}\n",
        f"a: {'1:' * 50_000}1\n",
        f"a: 0x{'f' * 5000}\n",
        f"a: {'x' * (5 << 20)}\n",
    ],
)
def test_settings_of_a_checkpoint_are_bounded(more):
    start = time.process_time()
    with pytest.raises(CheckpointError, match=r"its config\.yaml is damaged"):
        read_settings(f"model: {{}}\ntrainer: {{}}\n{more}", "step-5")
    assert time.process_time() - start < 10


def grid(shape, cuts):
    """The boxes between the cuts along each dim."""
    boxes = [([], [])]
    for size, inside in zip(shape, cuts, strict=True):
        edges = [0, *inside, size]
        boxes = [
            ([*offset, a], [*extent, b - a])
            for offset, extent in boxes
            for a, b in itertools.pairwise(edges)
        ]
    return boxes


@pytest.mark.parametrize(
    ("shape", "cuts"),
    [((), ()), ((0, 4), ([], [])), ((5,), ([2],)), ((6, 4), ([1, 2, 5], [3])),
     ((4, 4, 4), ([2], [1, 2], [3]))],
)  # fmt: skip
def test_a_grid_tiles_and_nothing_else_does(shape, cuts):
    boxes = grid(shape, cuts)
    random.Random(0).shuffle(boxes)
    assert tiles(shape, boxes)
    assert not tiles(shape, [])
    if len(boxes) > 1:
        assert not tiles(shape, boxes[1:])
        assert not tiles(shape, [*boxes[1:], boxes[1]])
        assert not tiles(shape, [*boxes, boxes[0]])
        offset, size = boxes[0]
        assert not tiles(shape, [([n - 1 for n in offset], size), *boxes[1:]])


def test_uneven_rows_of_columns_tile():
    assert tiles([4, 4], [([0, 0], [1, 2]), ([1, 0], [3, 2]), ([0, 2], [2, 2]), ([2, 2], [2, 2])])


def test_many_boxes_take_little_time():
    boxes = [([i, j], [1, 1]) for i in range(200) for j in range(200)]
    start = time.process_time()
    assert tiles([200, 200], boxes)
    assert time.process_time() - start < 5


def forged(folder, pieces, shape=(4, 3)):
    """A checkpoint whose tensor `w` lies in pieces of two files."""
    write(str(folder), small_state(7), step=7, is_temporary=False)
    path = folder / "step-7"
    halves = torch.arange(12.0).view(4, 3).split(2)
    names = [f"model-{n:05}-of-00002.safetensors" for n in range(2)]
    for name, half in zip(names, halves, strict=True):
        safetensors.torch.save_file({"w": half.contiguous()}, path / name)
    (path / "model.safetensors").unlink()
    index = {"model": {"w": {"shape": list(shape), "pieces": pieces}}}
    (path / "shards.json").write_text(json.dumps(index))
    return sealed_again(path, {"model.safetensors"}, {*names, "shards.json"})


def sealed_again(path, without, changed):
    marker = json.loads((path / "metadata.json").read_text())
    marker.pop("sha256")
    for name in without:
        del marker["files"][name]
    for name in changed:
        data = (path / name).read_bytes()
        marker["files"][name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "metadata.json").write_text(sealed(marker))
    return str(path)


FIRST, SECOND = [0, [0, 0], [2, 3]], [1, [2, 0], [2, 3]]


def test_pieces_that_fill_a_tensor_are_read(tmp_path):
    saved = load(forged(tmp_path, [SECOND, FIRST]))
    assert torch.equal(saved.tensors("model")["w"], torch.arange(12.0).view(4, 3))


@pytest.mark.parametrize(
    ("pieces", "shape"),
    [
        ([FIRST, [1, [0, 0], [2, 3]]], (4, 3)),
        ([FIRST, [1, [1, 0], [2, 3]]], (4, 3)),
        ([FIRST, [-1, [2, 0], [2, 3]]], (4, 3)),
        ([FIRST, [2, [2, 0], [2, 3]]], (4, 3)),
        ([FIRST, [True, [2, 0], [2, 3]]], (4, 3)),
        ([FIRST, [1, [2, -3], [2, 6]]], (4, 3)),
        ([FIRST, [1, [2.0, 0], [2, 3]]], (4, 3)),
        ([FIRST, [1, [2], [2]]], (4, 3)),
        ([FIRST, SECOND, [1, [2, 0], [0, 3]]], (4, 3)),
        ([FIRST, [1, [2, 0], [10**30, 3]]], (10**30, 3)),
        ([FIRST, [1, [2, 0], [10**12, 3]]], (10**12 + 2, 3)),
        ([], (0, 3)),
        ([FIRST], (2, 3, 1)),
    ],
)
def test_pieces_that_are_not_all_of_a_tensor_once_are_refused(tmp_path, pieces, shape):
    with pytest.raises(CheckpointError, match="is damaged"):
        load(forged(tmp_path, pieces, shape)).tensors("model")


@pytest.mark.parametrize("name", ["model.safetensors", "values.json", "metadata.json"])
@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_files_of_a_checkpoint_lie_in_it(tmp_path, name, kind):
    write(str(tmp_path), small_state(7), step=7, is_temporary=False)
    file = tmp_path / "step-7" / name
    file.rename(tmp_path / name)
    if kind == "link":
        file.symlink_to(tmp_path / name)
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(CheckpointError, match=f"{name} - is "):
        load(str(tmp_path / "step-7"))


def test_a_checkpoint_may_be_a_link_itself(tmp_path):
    write(str(tmp_path / "run"), small_state(7), step=7, is_temporary=False)
    (tmp_path / "link").symlink_to(tmp_path / "run" / "step-7")
    assert load(str(tmp_path / "link")).step == 7
