"""What is read from outside: a target for each reader, with valid files to start from.

The first byte of a case chooses what the rest stands for. A target reads a case or raises an
`OstroError`; whatever else it raises is a mistake of ours.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import pickle
import resource
import shutil
import signal
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.parquet
import torch

from ostro.checkpoint import discovery, single_file, store
from ostro.checkpoint.metadata import SHARDS, FileRecord, Metadata
from ostro.checkpoint.saved import load as load_folder
from ostro.cli.aliases import NATIVE
from ostro.compat.nanogpt import checkpoint_file
from ostro.config import check, dump_yaml, load, loading
from ostro.core.errors import OstroError
from ostro.data import meta
from ostro.data.cache import build
from ostro.data.cache.fingerprints import read_files
from ostro.data.cache.store import CacheDir
from ostro.data.sources.source import TokensSource, UrlsSource
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer import ByteTokenizer, CharTokenizer, tokenizer_from_text
from ostro.io.safetensors import read_tensors, tensor_pieces
from ostro.io.torch_files import read_file
from ostro.lm_config import TrainLmConfig

SECONDS = 10
"""A case that takes longer hangs."""
MEMORY = 1 << 30
"""Bytes that all cases together may add to the process."""


class Hang(BaseException):
    """A case took too long; no handler for ordinary errors may swallow it."""


@dataclass(frozen=True)
class Target:
    """A reader."""

    seeds: list[bytes]
    """Valid cases."""
    read: Callable[[bytes], object]
    """Reads a case."""
    words: tuple[bytes, ...] = ()
    """What such files consist of: mutations insert it."""

    def run(self, case: bytes) -> bool:
        """Read a case within the time; whether it was valid."""
        signal.signal(signal.SIGALRM, _hang)
        signal.setitimer(signal.ITIMER_REAL, SECONDS)
        try:
            self.read(case or b"\0")
        except OstroError:
            return False
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        return True


def speed_up() -> None:
    """Leave out what takes most of the time and depends on no input; only for a long run."""
    names = list(loading.dotted_names(TrainLmConfig))
    loading.dotted_names = lambda _: names
    checkpoint_file.tokenizer_text = lambda _: {}


def _hang(*_: Any) -> None:
    raise Hang


@contextlib.contextmanager
def limited_memory() -> Iterator[None]:
    """A case that asks for gigabytes ends in a `MemoryError`."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = pages * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def _cases(*contents: tuple[int, bytes | str]) -> list[bytes]:
    pairs = [(mode, c.encode() if isinstance(c, str) else c) for mode, c in contents]
    return [bytes([mode]) + content for mode, content in pairs]


def _words(text: str) -> tuple[bytes, ...]:
    return tuple(word.encode() for word in text.split())


# --- configurations

_CONFIGS = (
    "model: {<<: [{type: gpt2, hidden_dim: 16}, {num_heads: 2}], num_layers: 2}\n"
    "data: {source: stdlib, tokenizer: bytes}\n",
    "data: {source: stdlib}\noptimizer: {learning_rate: 1e-3, warmup: 0.1}\n"
    "trainer:\n  num_train_steps: 1_6\n  steps_per_eval: null\n"
    "  train_batch_size: [{start: 0, value: 4}, {start: 2, value: 8}]\n",
    "data: {source: stdlib}\ntrainer:\n  tracker: [&j {type: json_logger}, {type: tensorboard}]\n"
    "  checkpointer: {save_interval: 10m, keep: [&k {every: 2, until: 4}, {<<: *k, until: 9}]}\n",
)
_FLAGS = """\
--model.num_layers=2
--model
gpt2
--trainer.tracker.type
wandb
--trainer.train_batch_size
[{start: 0, value: 4}]
--data.source={type: tokens, dir: x}
--data.tokenizer=bytes
--trainer.mp=p=f32,c=bfloat16
--trainer.checkpointer.keep.0.every
4
"""


_VALUES = """\
data: {configs: {a: {type: stdlib}, b: {type: stdlib}}, train_weights: {a: 1, b: .5}, shuffle: 8}
trainer:
  deepspeed: {zero: [1, x, null], fp16: {enabled: yes}, 1: 2.5}
  distributed: {timeout: 5m}
  mp: p=f32,c=bfloat16
  seed: 99999999999999999999
  crash_on_nan: on
"""
_WRONG = """\
data: {source: stdlib, on_bad_record: skp, cache_dir: "s3://REDACTED@b", shuffle: 1.5}
optimizer: {learning_rate: 1e999, beta1: inf, weight_decay: x, warmup: -1, type: {}}
trainer: {seed: 1.0, num_train_steps: x, distributed: {timeout: 5q}, mp: p=f9, crash_on_nan: 2}
"""
_OVER_LISTS = """\
--trainer.tracker=[{type: wandb}, console]
--trainer.wandb.project=x
--trainer.tracker.1.type=tensorboard
--trainer.tracker.2={type: console}
--trainer.tracker.project=y
--data.tags.0=a
"""
_JOINED = "--data.source=stdlib\n--trainer.wandb.project=x\n--trainer.tracker.mode=offline"


def yaml_target(folder: Path) -> Target:
    """A file; a file that the first one includes; a checkpoint's; flags."""
    main, part = folder / "run.yaml", folder / "part.yaml"

    def read(case: bytes) -> None:
        mode, content = case[0] % 4, case[1:]
        main.write_bytes(content)
        texts, files, flags = None, [str(main)], []
        if mode == 1:
            part.write_bytes(content)
            main.write_text("<<: !include part.yaml\nmodel: !include part\n")
        elif mode == 2:
            texts = {str(main): content.decode(errors="replace")}
        elif mode == 3:
            lines = content.decode(errors="replace").replace("imports", "").splitlines()
            files, flags = [], lines
        loaded = load(TrainLmConfig, files, flags, texts=texts, trusted=False, aliases=NATIVE)
        dump_yaml(loaded.config)
        check(loaded.config)

    tags = "{a: !!int 1, b: !!python/name:os.system, ? [c]\n: 1, <<: 5, d: !include , d: 2}"
    includes = "model: !include run.yaml\ndata: !include memory://x.yaml\ntrainer: !include prt\n"
    return Target(
        _cases(*enumerate(_CONFIGS), (0, _CONFIGS[2]), (3, _FLAGS), (0, _VALUES), (0, _WRONG),
               (3, _OVER_LISTS), (3, _JOINED), (0, "trainer: {seed: " + "1" * 4001 + "}"),
               (0, "data: {source: stdlib, cache_dir: s3://REDACTED@b}"),
               (0, tags), (0, includes),
               (1, "hidden_dim: 16"), (0, "- 1"), (0, "!include part.yaml"), (0, "a: ["),
               (0, "\xff"), (0, ""), (3, "model\n--1\n--model.\n--modle=2\n--data\n!include x")),
        read,
        _words(": - ? & * ! !include !!str !!int !!binary | > [ ] { } , # << *base &base \n \t "
               "null true 1e999 0x1 .inf ~ 'a' \"\\x00\" type base trainer model data"),
    )  # fmt: skip


# --- documents

_NAMES = (
    "a.txt", "a.jsonl", "a.json", "a.parquet", "a.jsonl.gz", "a.json.zst", "a.txt.bz2",
    "a.jsonl.xz", "a.txt.zip", "a.parquet.gz", "a.bin",
)  # fmt: skip
_LINES = '{"text": "one"}\n{"text": 2}\n{"texts": "3"}\n[]\n{"text": "\\ud800"}\n{"text": "é"}\n'


def documents_target(folder: Path) -> Target:
    """Text, JSON lines, JSON and parquet, plain and compressed, as `data.train_urls` has them."""

    def read(case: bytes) -> None:
        if case[0] % 16 == 11:  # names of files, never outside of the folder or on a network
            text = case[1:].decode(errors="replace").replace("..", "").replace("::", "")
            names = [name for name in text.splitlines() if "://" not in name]
            names = [f"memory://b/{name[1:]}" if name[:1] == "@" else f"{folder}/{name}"
                     for name in names]  # fmt: skip
            UrlsSource(names, format="text").list_shards("train")
            return
        path = folder / _NAMES[case[0] % len(_NAMES)]
        path.write_bytes(case[1:])
        for shard in UrlsSource([str(folder / "a*" / ".." / path.name)]).list_shards("train"):
            for _ in UrlsSource().read_shard(shard):
                pass

    (folder / "a").mkdir()
    (folder / "b.txt").write_text("text")
    fsspec.filesystem("memory").pipe_file("/b/c.txt", b"text")
    table, buffer = pyarrow.table({"text": ["one", None, "three"], "n": [1, 2, 3]}), io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    other = io.BytesIO()
    pyarrow.parquet.write_table(table.select(["n"]), other, compression="zstd")
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a", _LINES)
    lines, array = _LINES.encode(), b'[{"text": "a"}, {"text": 1}]'
    return Target(
        _cases((0, "text"), (0, b"\xff"), (1, lines), (2, lines), (2, array), (2, b"{"), (2, ""),
               (2, b"[\n{]"), (2, b'{\n"text": "x"}'), (3, buffer.getvalue()),
               (3, other.getvalue()), (4, gzip.compress(lines)), (4, gzip.compress(lines)[:20]),
               (5, pyarrow.compress(array, "zstd", asbytes=True)), (6, bz2.compress(b"text")),
               (7, lzma.compress(lines)), (8, zipped.getvalue()), (10, "x"), (11, "b.txt"),
               (11, "b.t*\n@c.txt\n@*.txt"), (11, "b.txt\nb.txt\na\n@\n@x*"),
               (11, "{1..9999999}\n?x\n@y"), (6, bz2.compress(bytes(1 << 27))),
               (9, gzip.compress(buffer.getvalue())), (1, b"[" * 3000), (1, b"\xff\n")),
        read,
        (b'"text"', b'{"text": ', b"\\u", b"\xef\xbb\xbf", b"PAR1", b"\n", b"1" * 5000),
    )  # fmt: skip


# --- token files


def tokens_target(folder: Path) -> Target:
    """`train.bin` of 2 and 4 bytes an id, and what is remembered of its largest id."""
    train = folder / "train.bin"
    record = folder / "cache" / "train" / "tokens.json"

    def read(case: bytes) -> None:
        mode, content = case[0] % 3, case[1:]
        source = TokensSource(dir=str(folder), dtype="uint32" if mode == 1 else "uint16")
        config = LMDatasetConfig(source=source, cache_dir=str(folder / "cache"))
        train.write_bytes(bytes(range(64)) if mode == 2 else content)
        record.unlink(missing_ok=True)
        if mode == 2:
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_bytes(content)
        config.build(ByteTokenizer() if mode else CharTokenizer("ab" * 20000, False), 4, 0)

    train.write_bytes(bytes(64))
    for dtype in ("uint16", "uint32"):
        source = TokensSource(dir=str(folder), dtype=dtype)
        LMDatasetConfig(source=source, cache_dir=str(folder / "cache")).build(ByteTokenizer(), 4, 0)
    return Target(
        _cases((0, bytes(64)), (1, bytes(64)), (0, b"\xff" * 64), (0, b"x"), (0, b""),
               (0, bytes(4)), (2, record.read_bytes()), (2, b"[" * 2000)),
        read,
        _words('"key" "largest" [ ] { } , : -1 1e999 null'),
    )  # fmt: skip


# --- the cache's ledger and notes


def ledger_target(folder: Path) -> Target:
    """The ledgers of a build, here and behind a URL, its notes, and a learned tokenizer's."""
    text = folder / "a.txt"
    text.write_text("ab " * 100)
    remote = fsspec.filesystem("memory")
    source, home = UrlsSource([str(text)]), folder / "cache"
    request = build.CacheRequest("train", source, "train", ByteTokenizer(), num_workers=1)
    build.open_cache(request, CacheDir(str(home)))
    ledger, kept = home / "train" / "ledger.json", folder / "kept"
    shutil.copytree(home / "train", kept)
    key = request.key(read_files(home / "train", source.list_shards("train")))
    writer = build._Writer(request, _empty(folder / "notes"), key)
    writer.commit()
    writer.commit_quietly()
    notes = folder / "notes" / "progress.jsonl"
    bpe = LMDatasetConfig(source=source, cache_dir=str(folder / "learned"), tokenizer=_bpe(259))
    bpe.build_tokenizer()
    learned = folder / "learned" / "tokenizer" / "ledger.json"
    spec = (folder / "learned" / "tokenizer" / "tokenizer.json").read_bytes()
    seeds = [ledger.read_bytes(), notes.read_bytes(), learned.read_bytes()]
    outside = folder / "outside"

    def read(case: bytes) -> None:
        mode, content = case[0] % 6, case[1:]
        if mode in (0, 4, 5):  # with the files, without them, and to be built again
            ledger.write_bytes(content)
            wanted = replace(request, on_bad_record="skip", rebuild=mode == 5)
            if mode == 4:
                text.rename(text.with_suffix(".gone"))
            try:
                opened = build.open_cache(wanted, CacheDir(str(home)))
            finally:
                if mode == 4:
                    text.with_suffix(".gone").rename(text)
            assert list(opened.documents.parts(0, opened.store.num_tokens))
        elif mode == 1:
            notes.write_bytes(content)
            build._Writer(request, notes.parent, key).commit_quietly()
        elif mode == 2:
            learned.write_bytes(content)
            (learned.parent / "tokenizer.json").write_bytes(spec)
            bpe.build_tokenizer()
        else:
            os.environ["OSTRO_CACHE_HOME"] = str(_empty(folder / "home"))
            for name in ("outside", "base/cache/outside", "base/cache/train/tokens-00000.bin"):
                remote.pipe_file(f"/{name}", b"x")
            remote.pipe_file("/base/cache/train/ledger.json", content)
            for _ in range(2):
                CacheDir("memory://base/cache").fetch("train")
            assert not outside.exists()

    for index, mode in ((0, 0), (1, 1), (2, 2), (0, 3), (0, 4)):
        seeds.append(bytes([mode]) + seeds[index])
    evil = b'{"stored": ["../../outside"]}'
    other = seeds[0].replace(b'"enforce_eos": true', b'"files": {}, "enforce_eos": false')
    renamed = seeds[0].replace(b'a.txt", 300', b'b.txt", 301')
    assert seeds[0] not in (other, renamed)
    return Target(
        [
            *seeds[3:],
            *_cases(
                (3, evil),
                (0, other),
                (0, renamed),
                (5, other),
                (0, b"null"),
                (0, b"[" * 2000),
                (1, b"null\n"),
                (1, seeds[1].replace(b"[0, 0, 0]", b"[9, 0, 0]")),
                (1, seeds[1].replace(b"[0, 0, 0]", b"[0, 0, 7]")),
                (1, seeds[1].replace(b'"key": "', b'"key": "0')),
                (1, b"x\n"),
            ),
        ],
        read,
        _words('"key" "files" "shards" "stored" "position" ../ [ ] { } , : -1 1e999 null "uint16"'),
    )


def _bpe(vocab_size: int) -> Any:
    """A byte-pair tokenizer of so many tokens."""
    text = f"data: {{source: stdlib, tokenizer: {{type: bpe, vocab_size: {vocab_size}}}}}"
    return load(TrainLmConfig, ["c"], texts={"c": text}).config.data.tokenizer


def _empty(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


# --- checkpoints


def manifest_target(folder: Path) -> Target:
    """`metadata.json` as it is; the small files, and tensors in parts, under right checksums."""
    tensors = {"a": torch.arange(4.0), "b": torch.zeros(2, 2)}
    state = store.State({"model": tensors, "state": {"c": torch.ones(())}}, {"step": 1})
    state = replace(state, texts={"config.yaml": "seed: 1\n"})
    metadata = store.write(str(folder), state, step=0, is_temporary=False, timestamp=1.0)
    assert metadata is not None
    step = folder / "step-0"
    marker, values = step / "metadata.json", (step / "values.json").read_bytes()
    parts = {}
    for number, half in enumerate(({"a": tensors["a"][:2]}, {"a": tensors["a"][2:]})):
        name = f"model-{number:05}-of-00002.safetensors"
        data = b"".join(map(bytes, tensor_pieces(half)))
        parts[name] = _record(step / name, data)
    index = {"a": {"shape": [4], "pieces": [[0, [0], [2]], [1, [2], [2]]]}}
    shards = json.dumps({"model": index})
    whole = dict(metadata.files)

    def read(case: bytes) -> None:
        mode, content = case[0] % 4, case[1:]
        if mode in (0, 3):
            (step / "values.json").write_bytes(values)
            marker.write_bytes(content)
        else:
            name = SHARDS if mode == 1 else "values.json"
            files = whole | {name: _record(step / name, content)}
            if mode == 1:
                (step / "values.json").write_bytes(values)
                del files["model.safetensors"]
                files |= parts
            text = Metadata(0, 1.0, False, False, "id", "name", files).to_json()
            marker.write_text(text)
        path = str(step)
        if mode == 3:
            remote.put(path, "/checkpoints/step-0", recursive=True)
            path = "memory://checkpoints/step-0"
        saved = load_folder(path)
        saved.verify()
        for group in saved.groups:
            saved.tensors(group)
        assert saved.step >= 0 and str(saved) == path
        discovery.scan(str(folder))
        with contextlib.suppress(OstroError):
            saved.tensors("nothing")
        for no_checkpoint in (str(folder), str(folder / "nothing")):
            with contextlib.suppress(OstroError):
                load_folder(no_checkpoint)

    plain, remote = marker.read_text(), fsspec.filesystem("memory")
    return Target(
        _cases((0, plain), (3, plain), (1, shards), (2, values), (0, b"[" * 2000),
               (0, b"[]"), (0, b"{}"),
               (0, plain.replace('"format": 1', '"format": 9')),
               (0, plain.replace("values.json", "../values.json")),
               (0, plain.replace('"bytes": ', '"bytes": 1')),
               (0, plain.replace('"sha256": "', '"sha256": "0')),
               (0, plain.replace('"step": 0', '"step": -1')),
               (0, plain.replace('"values.json"', '"other.json"'))),
        read,
        _words('"files" "bytes" "sha256" "step" "shape" "pieces" "model" "a" ../ [ ] { } , : -1 '
               "1e999 null NaN 99999999999999999999999 true"),
    )  # fmt: skip


def _record(path: Path, data: bytes) -> FileRecord:
    path.write_bytes(data)
    return FileRecord(len(data), hashlib.sha256(data).hexdigest())


def pt_target(folder: Path) -> Target:
    """A `.pt` file; the pickle within one; `latest_checkpoint.pt` that names a folder."""
    path, odd = folder / "step_1.pt", _nanogpt_content()
    odd["model"]["lm_head.weight"] = torch.ones(2, 2)
    tensors = {"model": {"a": torch.ones(2)}, "optimizer": {"a.step": torch.ones(())}}
    content = single_file.FileFormat().pack(
        store.State(tensors, {"step": 1}, {"config.yaml": "seed: 1"})
    )
    single_file.write_file(path, content)
    ours = path.read_bytes()
    single_file.write_file(path, _nanogpt_content())
    theirs = path.read_bytes()
    odd["ostro"] = {"values": {}, "texts": {"config.yaml": "model: {}"}}
    single_file.write_file(path, odd)
    untied = path.read_bytes()
    del odd["model"]["lm_head.weight"]
    single_file.write_file(path, odd)
    no_settings = path.read_bytes()
    del odd["model"]["transformer.wte.weight"]
    single_file.write_file(path, odd)
    incomplete = path.read_bytes()
    torch.save(content, path, _use_new_zipfile_serialization=False)
    legacy = path.read_bytes()
    single_file.point_to(_empty(folder / "step-9"))
    pointer = (folder / single_file.LATEST).read_bytes()

    def read(case: bytes) -> None:
        mode, content = case[0] % 4, case[1:]
        if mode == 0:
            path.write_bytes(content)
        elif mode == 3:
            (folder / single_file.LATEST).write_bytes(content)
            discovery.find_latest(str(folder / single_file.LATEST))
            return
        else:
            _repack(ours if mode == 1 else theirs, content, path)
        saved = single_file.load_file(path)
        content = read_file(path, check=False)
        if checkpoint_file.NanoGptFormat().fits(content):
            checkpoint_file.own_settings(content, path.name)
        assert isinstance(saved.step, int) and str(saved) == str(path) and saved.texts is not None
        for group in ("model", "optimizer", "state"):
            with contextlib.suppress(OstroError):
                saved.stored(group)

    return Target(
        _cases((0, ours), (0, theirs), (0, legacy), (0, untied), (0, no_settings),
               (0, incomplete), (0, b"PK"),
               (1, _pickled(ours)), (3, pointer),
               (2, _pickled(theirs)), (3, b"{}"), (1, pickle.dumps({"model": {}}, 2)),
               (1, pickle.dumps([1], 2)), (1, pickle.dumps(Path("x"), 2)), (3, b"x"),
               (1, pickle.dumps(dict(content, values=1), 2)),
               (1, pickle.dumps({"model_args": 1}, 2))),
        read,
        (b"PK\x03\x04", b"PK\x05\x06", b"ctorch._utils\n_rebuild_tensor_v2\n", b"}", b"]",
         b"cos\nsystem\n", b"\x8a\x7f", b"J\xff\xff\xff\x7f", b"X\xff\xff\xff\x7f", b"storage",
         b"format", b"model"),
    )  # fmt: skip


def _nanogpt_content() -> dict[str, Any]:
    """What nanoGPT saves of a model of one block."""
    args = {"n_layer": 1, "n_head": 1, "n_embd": 2, "block_size": 2, "bias": False,
            "vocab_size": 2, "dropout": 0.0}  # fmt: skip
    shapes = {"wte.weight": (2, 2), "wpe.weight": (2, 2), "h.0.ln_1.weight": (2,),
              "h.0.attn.c_attn.weight": (6, 2), "h.0.attn.c_proj.weight": (2, 2),
              "h.0.ln_2.weight": (2,), "h.0.mlp.c_fc.weight": (8, 2),
              "h.0.mlp.c_proj.weight": (2, 8), "ln_f.weight": (2,)}  # fmt: skip
    weights = {f"transformer.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    order = sorted(range(len(shapes)), key=lambda i: len(list(shapes.values())[i]) < 2)
    moments = [list(weights.values())[i] for i in order]
    group = {"lr": 1.0, "params": list(range(6))}
    return {
        "model": weights | {"lm_head.weight": weights["transformer.wte.weight"]},
        "optimizer": {
            "state": {i: {"step": torch.ones(()), "exp_avg": m} for i, m in enumerate(moments)},
            "param_groups": [group, {"lr": 1.0, "params": list(range(6, 9))}],
        },
        "model_args": args,
        "iter_num": 3,
        "best_val_loss": 2.5,
        "config": {"batch_size": 2, "dataset": "x", "out_dir": "out", "n_layer": 1},
    }


def _pickled(file: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(file)) as archive:
        name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
        return archive.read(name)


def _repack(file: bytes, pickled: bytes, path: Path) -> None:
    """The archive with another pickle in it, under right checksums."""
    with zipfile.ZipFile(io.BytesIO(file)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, pickled if name.endswith("data.pkl") else old.read(name))


def safetensors_target(folder: Path) -> Target:
    """A file of tensors; its JSON header with the right length before it."""
    path = folder / "model.safetensors"
    tensors = {"a": torch.ones(2, 2), "b": torch.zeros(3, dtype=torch.int64), "c": torch.ones(0)}
    whole = b"".join(map(bytes, tensor_pieces(tensors)))
    length = int.from_bytes(whole[:8], "little")

    def read(case: bytes) -> None:
        content = case[1:]
        if case[0] % 2:
            content = len(content).to_bytes(8, "little") + content + whole[8 + length :]
        path.write_bytes(content)
        for tensor in read_tensors(str(path), path.name).values():
            tensor.clone()

    header = whole[8 : 8 + length]
    return Target(
        _cases((0, whole), (1, header), (0, b""), (0, b"\xff" * 16)),
        read,
        _words('"dtype" "shape" "data_offsets" "F32" "__metadata__" [ ] { } , : -1 1e999 null '
               "18446744073709551615 0"),
    )  # fmt: skip


# --- smaller readers


def alphabet_target(folder: Path) -> Target:
    """`meta.json`, `meta.pkl`, and the tokenizer of a checkpoint."""
    alphabet = {"vocab_size": 2, "itos": {0: "a", 1: "b"}, "stoi": {"a": 0, "b": 1}}

    def read(case: bytes) -> None:
        mode, content = case[0] % 3, case[1:]
        if mode == 2:
            tokenizer_from_text(content.decode(errors="replace"), None, "tokenizer.json")
            return
        path = folder / ("meta.pkl" if mode else "meta.json")
        path.write_bytes(content)
        meta.read_alphabet(path if mode else folder)

    with contextlib.suppress(OstroError):
        meta.read_alphabet(folder)
    text, bpe = json.dumps(alphabet), _bpe(259).learn([lambda: iter(["ab ab"])])
    others = [{"itos": ["a", "b"]}, {"stoi": {}}, {"vocab_size": 3}]
    return Target(
        _cases((0, text), (1, pickle.dumps(alphabet)), (1, pickle.dumps(Path("x"))),
               (1, pickle.dumps(alphabet, 0)), (2, CharTokenizer("ab", True).to_text()),
               (2, ByteTokenizer().to_text()), (2, bpe.to_text()), (0, "[]"),
               (0, '{"itos": ["ab"]}'), (2, "[" * 2000),
               *((0, json.dumps(alphabet | other)) for other in others)),
        read,
        _words('"itos" "stoi" [ ] { } , : -1 1e999 null "type" "chars" "bytes"'),
    )  # fmt: skip


TARGETS: dict[str, Callable[[Path], Target]] = {
    "yaml": yaml_target,
    "documents": documents_target,
    "tokens": tokens_target,
    "ledger": ledger_target,
    "manifest": manifest_target,
    "pt": pt_target,
    "safetensors": safetensors_target,
    "alphabet": alphabet_target,
}
