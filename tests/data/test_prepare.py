"""The scripts under data/: what they write, against a computation of its own; what they refuse."""

import importlib.util
import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from token_files import write_token_files

from ostro.core.errors import DataError
from ostro.data.tokenizer import CharTokenizer
from ostro.data.tokenizer_config import Gpt2Tokenizer, MetaTokenizer

SCRIPTS = Path(__file__).parents[2] / "data"
EOT = 50256
NO_NETWORK = {
    **os.environ,
    "http_proxy": "http://127.0.0.1:9",
    "https_proxy": "http://127.0.0.1:9",
    "no_proxy": "",
    "HF_HUB_OFFLINE": "1",
}


def prepare(name, tmp_path, *words):
    command = [sys.executable, str(SCRIPTS / name / "prepare.py"), *words]
    environment = {**NO_NETWORK, "HF_HOME": str(tmp_path / "hf")}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=tmp_path, env=environment
    )


@pytest.fixture(scope="module")
def gpt2():
    """Ids of one text, by the tokenizer that other tests compare with a second implementation."""
    return Gpt2Tokenizer().build().encode_prompt


def ids(path):
    assert path.stat().st_size % 2 == 0
    return np.frombuffer(path.read_bytes(), dtype="<u2").tolist()


def assert_nothing_unfinished(folder, *names):
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_austen_cuts_every_book_in_two(tmp_path, gpt2):
    books = {
        "emma": "Emma Woodhouse, handsome, clever, and rich.\n" * 30,
        "persuasion": "Sir Walter Elliot, of Kellynch Hall. É\n" * 20,
    }
    (tmp_path / "books").mkdir()
    (tmp_path / "books/emma.txt").write_text(books["emma"])
    around = (
        "\ufeffThe Project Gutenberg eBook of Persuasion\r\n\r\n"
        "*** START OF THE PROJECT GUTENBERG EBOOK PERSUASION ***\r\n\r\n{}\r\n"
        "*** END OF THE PROJECT GUTENBERG EBOOK PERSUASION ***\r\nlicence"
    )
    crlf = books["persuasion"].replace("\n", "\r\n")
    (tmp_path / "books/persuasion.txt").write_bytes(around.format(crlf).encode())
    done = prepare("austen", tmp_path, "--text_dir", "books", "--out_dir", "data/mine")
    assert done.returncode == 0, done.stderr
    train, val = [], []
    for text in books.values():
        cut = int(len(text) * 0.9)
        train += [*gpt2(text[:cut]), EOT]
        val += [*gpt2(text[cut:]), EOT]
    assert ids(tmp_path / "data/mine/train.bin") == train
    assert ids(tmp_path / "data/mine/val.bin") == val
    assert_nothing_unfinished(tmp_path / "data/mine", "train.bin", "val.bin")
    assert f"data/mine/train.bin: {len(train):,} tokens" in done.stdout
    assert "python train.py dataset=mine " in done.stdout


def test_shakespeare_is_byte_for_byte_what_nanogpt_writes(tmp_path):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 40
    (tmp_path / "input.txt").write_text(text)
    done = prepare("shakespeare_char", tmp_path, "--text_file", "input.txt", "--out_dir", "out")
    assert done.returncode == 0, done.stderr
    chars = sorted(set(text))
    stoi = {char: index for index, char in enumerate(chars)}
    itos = dict(enumerate(chars))
    cut = int(len(text) * 0.9)
    for name, part in (("train", text[:cut]), ("val", text[cut:])):
        wanted = np.array([stoi[char] for char in part], dtype=np.uint16).tobytes()
        assert (tmp_path / f"out/{name}.bin").read_bytes() == wanted
    with open(tmp_path / "out/meta.pkl", "rb") as file:
        assert pickle.load(file) == {"vocab_size": len(chars), "itos": itos, "stoi": stoi}
    for place in ("out", "out/meta.json", "out/meta.pkl"):
        built = MetaTokenizer(str(tmp_path / place)).build()
        assert built.decode(ids(tmp_path / "out/val.bin")) == text[cut:]
    assert_nothing_unfinished(tmp_path / "out", "train.bin", "val.bin", "meta.json", "meta.pkl")


def test_openwebtext_from_a_local_folder(tmp_path, gpt2):
    datasets = pytest.importorskip("datasets")
    texts = [f"Document {n} says {n * n}.\n" + "More of it. " * (n % 7) for n in range(3000)]
    (tmp_path / "copy").mkdir()
    for part in range(2):
        lines = [json.dumps({"text": text}) for text in texts[part * 1500 : part * 1500 + 1500]]
        (tmp_path / f"copy/part{part}.jsonl").write_text("\n".join(lines))
    done = prepare("openwebtext", tmp_path, "--dataset_dir", "copy", "--out_dir", "out")
    assert done.returncode == 0, done.stderr
    rows = datasets.Dataset.from_dict({"text": texts})
    parts = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    assert len(parts["test"]) == 2
    for name, part in (("train", parts["train"]), ("val", parts["test"])):
        wanted = [index for text in part["text"] for index in [*gpt2(text), EOT]]
        assert ids(tmp_path / f"out/{name}.bin") == wanted


def test_your_own_files(tmp_path, gpt2):
    texts = [f"Record {n}" for n in range(10)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"body": text}) for text in texts))
    (tmp_path / "b.txt").write_text("line of a text file\n" * 10)
    words = ("--text_key", "body", "--val_fraction", "0.2", "--out_dir", "out")
    done = prepare("processed", tmp_path, "--input", "*.jsonl", "b.txt", *words)
    assert done.returncode == 0, done.stderr
    train = [text for n, text in enumerate(texts) if n not in (4, 9)]
    train = [*train, "line of a text file\n" * 8]
    val = [texts[4], texts[9], "line of a text file\n" * 2]
    for name, parts in (("train", train), ("val", val)):
        wanted = [index for text in parts for index in [*gpt2(text), EOT]]
        assert ids(tmp_path / f"out/{name}.bin") == wanted
    assert "next: python3 src/train.py --config configs/model_configs/" in done.stdout


def test_processed_without_arguments_takes_a_text_that_is_always_there(
    tmp_path, monkeypatch, capsys
):
    spec = importlib.util.spec_from_file_location("processed", SCRIPTS / "processed/prepare.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr("ostro.data.sources.source._STDLIB", tmp_path)
    for number in range(60):  # one in fifty is for validation
        (tmp_path / f"module{number}.py").write_text(f"x = {number}\n")
    monkeypatch.setattr(sys, "argv", ["prepare.py", "--out_dir", str(tmp_path / "out")])
    script.main()
    out = capsys.readouterr().out
    assert out.startswith("no --input: taking the source code of Python's standard library\n")
    count = sum(len(ids(tmp_path / f"out/{split}.bin")) for split in ("train", "val"))
    assert count > 60 * 4


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("austen", "--text_dir DIR"),
        ("shakespeare_char", "--text_file FILE"),
        ("openwebtext", "--dataset_dir DIR"),
    ],
)
def test_without_network_one_line_names_the_offline_flag(tmp_path, name, flag):
    done = prepare(name, tmp_path, "--out_dir", "out")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and flag in done.stderr, done.stderr
    assert list(tmp_path.glob("out/*")) == []


@pytest.mark.parametrize(
    ("name", "words", "says"),
    [
        ("austen", ["--text_dir", "."], r"--text_dir = \. - holds no \.txt file"),
        ("shakespeare_char", ["--text_file", "no.txt"], r"no\.txt - cannot be read .*No such file"),
        ("shakespeare_char", ["--text_file", "latin.bin"], r"latin\.bin - is not UTF-8"),
        ("openwebtext", ["--dataset_dir", "no"], "no - is no folder"),
        ("openwebtext", ["--dataset_dir", "."], "cannot be opened|has"),
        ("processed", ["--input", "*.jsonl"], "matches no file"),
        ("processed", ["--input", "one.json"], "no text is left for it"),
        ("processed", ["--input", "bad.ndjson"], "line 1 - is not JSON"),
        ("processed", ["--source", "stdlib", "--out_dir", "latin.bin"], "File exists"),
    ],
)
def test_mistakes_are_answered_without_a_traceback(tmp_path, name, words, says):
    (tmp_path / "latin.bin").write_bytes(b"caf\xe9")
    (tmp_path / "one.json").write_text('[{"text": "only one"}]')
    (tmp_path / "bad.ndjson").write_text("no json\n")
    done = prepare(name, tmp_path, "--out_dir", "out", *words)
    assert done.returncode == 2, done.stderr
    assert re.search(says, done.stderr) and "Traceback" not in done.stderr, done.stderr
    assert list(tmp_path.glob("out/*")) == []


def test_an_error_midway_leaves_the_files_of_before(tmp_path):
    tokenizer = CharTokenizer("ab", eos=False)
    assert write_token_files(tmp_path, [("train", "ab"), ("val", "b")], tokenizer) == {
        "train": 2,
        "val": 1,
    }

    def broken():
        yield "train", "bbb"
        raise DataError("no more")

    with pytest.raises(DataError, match="no more"):
        write_token_files(tmp_path, broken(), tokenizer)
    assert ids(tmp_path / "train.bin") == [0, 1] and ids(tmp_path / "val.bin") == [1]
    write_token_files(tmp_path, [("train", "bb"), ("val", "a")], tokenizer)
    assert ids(tmp_path / "train.bin") == [1, 1] and ids(tmp_path / "val.bin") == [0]
    assert_nothing_unfinished(tmp_path, "train.bin", "val.bin")


def test_order_is_kept_across_batches_of_long_texts(tmp_path, gpt2, monkeypatch):
    monkeypatch.setattr("token_files._BATCH_CHARS", 1000)
    long = "A line of some length, repeated.\n" * 3000
    texts = [("train", "first"), ("val", "one"), ("train", long), ("val", "two"), ("train", "end")]
    write_token_files(tmp_path, texts, Gpt2Tokenizer().build())
    for split in ("train", "val"):
        wanted = [index for s, text in texts if s == split for index in [*gpt2(text), EOT]]
        assert ids(tmp_path / f"{split}.bin") == wanted


def test_an_end_of_text_within_a_text_is_text(tmp_path):
    write_token_files(tmp_path, [("train", "<|endoftext|>"), ("val", "b")], Gpt2Tokenizer().build())
    train = ids(tmp_path / "train.bin")
    assert train.count(EOT) == 1 and train[-1] == EOT and len(train) > 2
    assert Gpt2Tokenizer().build().decode(train[:-1]) == "<|endoftext|>"


def test_alphabets_beyond_two_bytes_are_refused(tmp_path):
    alphabet = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x14000)]))
    with pytest.raises(DataError, match="do not fit uint16"):
        write_token_files(tmp_path, [], CharTokenizer(alphabet, eos=False))


def test_what_the_scripts_write_is_not_for_git(tmp_path):
    names = [f"data/{name}/train.bin" for name in ("austen", "processed", "mine")]
    names.append("data/shakespeare_char/meta.pkl")
    command = ["git", "check-ignore", *names, "data/austen/prepare.py"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=SCRIPTS.parent)
    if done.returncode == 128:
        pytest.skip("not a git repository")
    assert done.stdout.split() == names
