"""Special tokens: prompts stay open, text stays text, the end is looked for where it is named."""

import json
import logging

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from ostro.core.errors import DataError
from ostro.data.cache.build import CacheRequest, open_cache
from ostro.data.cache.encode import Piece, encode
from ostro.data.cache.store import CacheDir
from ostro.data.sources.source import UrlsSource
from ostro.data.tokenizer import LibraryTokenizer, tokenizer_from_text
from ostro.data.tokenizer_config import (
    BpeTokenizer,
    BytesTokenizer,
    CharsTokenizer,
    Gpt2Tokenizer,
    PretrainedTokenizer,
)

VOCAB = {"[UNK]": 0, "<s>": 1, "</s>": 2, "<stop>": 3, "a": 4, "b": 5}
NAMES = [("<s>", 1), ("</s>", 2)]


def word_level(special=("<s>", "</s>", "<stop>"), unk="[UNK]"):
    inner = Tokenizer(models.WordLevel(VOCAB, unk_token=unk))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(list(special))
    return inner


def llama_like(scheme="first", **decoder):
    """Words with their space before them, single bytes where there is no token."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += ["▁", "▁the", "▁cat", "▁sat", "▁on", "!"]
    vocab = {name: index for index, name in enumerate(names)}
    model = models.WordLevel(vocab, unk_token="<unk>")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme)
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    inner.add_special_tokens(["<s>", "</s>"])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=NAMES)
    return LibraryTokenizer(inner)


@pytest.mark.parametrize(
    ("processor", "begin", "end"),
    [
        (processors.TemplateProcessing(single="$A </s>", special_tokens=NAMES), [], [2]),
        (processors.TemplateProcessing(single="<s> $A </s>", special_tokens=NAMES), [1], [2]),
        (processors.TemplateProcessing(single="<s> $A", special_tokens=NAMES), [1], []),
        (processors.RobertaProcessing(("</s>", 2), ("<s>", 1)), [1], [2]),
        (processors.BertProcessing(("</s>", 2), ("<s>", 1)), [1], [2]),
        (
            processors.Sequence(
                [
                    processors.ByteLevel(),
                    processors.TemplateProcessing(single="<s> $A </s>", special_tokens=NAMES),
                ]
            ),
            [1],
            [2],
        ),
        (None, [], []),
    ],
)
def test_a_prompt_has_the_beginning_of_the_template_and_no_end(processor, begin, end):
    inner = word_level()
    if processor is not None:
        inner.post_processor = processor
    built = LibraryTokenizer(inner)
    assert built.encode_prompt("a b") == [*begin, 4, 5]
    assert built.encode_prompt("") == begin
    assert built.encode_prompt("a", begin=False) == [4]
    assert built.encode_prompt("<s> a") == [1, 4]  # a beginning that is typed is not added again
    assert built.encode_prompt("a </s>") == [*begin, 4, 2]  # nor is a typed end taken away
    assert built.encode_documents(["a b"])[0].tolist() == [*begin, 4, 5, *end]
    tokens, _, _ = encode(built, 2, "uint16", "text", [Piece("a b", True)])
    assert tokens.tolist() == [*begin, 4, 5, 2]


@pytest.mark.parametrize("scheme", ["first", "always"])
def test_text_is_decoded_behind_its_prompt(scheme):
    built = llama_like(scheme)
    context = built.encode_prompt("the cat")
    written = built.encode_prompt("sat on", begin=False)
    assert built.decode(written) == "sat on"  # alone, it loses its space
    assert built.decode_after(context, written) == " sat on"
    assert built.decode_after(built.encode_prompt(""), written) == "sat on"
    assert built.decode_after(context, []) == ""


def test_characters_of_several_tokens_behind_a_prompt():
    built = llama_like()
    vocab = built.inner.get_vocab()

    def ids(data):
        return [vocab[f"<0x{byte:02X}>"] for byte in data]

    context = [*built.encode_prompt("the"), *ids("🎉".encode())]
    assert built.decode_after(context, ids("é🎉".encode())) == "é🎉"
    # The decoder makes nothing of a run of bytes whose last character is cut off.
    assert built.decode_after(context, ids("é🎉".encode()[:-1])) == "é\ufffd"
    assert built.decode_after(context, ids(b"\xff\xff\xff\xff\xff\xff")).strip("\ufffd") == ""
    in_the_middle = [*built.encode_prompt("the"), *ids("🎉".encode()[:2])]
    assert built.decode_after(in_the_middle, ids("🎉".encode()[2:])) == "🎉"
    plain = BytesTokenizer().build()
    assert plain.decode_after(list("🎉é".encode()[:-1]), list("é".encode()[-1:])) == "é"


def test_a_decoder_that_changes_what_stands_before():
    inner = word_level()
    inner.decoder = decoders.Sequence([decoders.Fuse(), decoders.Replace("ab", "X")])
    built = LibraryTokenizer(inner)
    assert built.decode([4, 5]) == "X"
    assert built.decode_after([4], [5]) == "b"
    assert built.decode_after([5], [4, 5]) == "X"


def test_a_prompt_that_is_not_utf8():
    for built in (Gpt2Tokenizer().build(), BytesTokenizer().build(), llama_like()):
        with pytest.raises(DataError, match=r"prompt = the \\udcff - is not UTF-8"):
            built.encode_prompt("the \udcff")


def unigram():
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("a", -1.0)] + [(c, -3.0) for c in "</s>"]
    inner = Tokenizer(models.Unigram(pieces, unk_id=0))
    inner.add_special_tokens(["</s>"])
    return inner, "</s>"


def words():
    return word_level(), "</s>"


def words_without_a_list():
    return word_level(special=()), "</s>"


def word_pieces():
    vocab = {"[UNK]": 0, "a": 1, "[SEP]": 2, "[": 3, "##SEP]": 4}
    inner = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["[SEP]"])
    return inner, "[SEP]"


def whole_words_of_a_bpe():
    spec = json.loads(BpeTokenizer(vocab_size=300).learn([lambda: iter(["a b"])]).to_text())
    spec["model"]["ignore_merges"] = True
    return Tokenizer.from_str(json.dumps(spec)), "<|endoftext|>"


def merged_by_a_bpe():
    vocab = {"a": 0, "<": 1, "s": 2, ">": 3, "<s": 4, "<s>": 5}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[("<", "s"), ("<s", ">")]))
    inner.add_special_tokens(["<s>"])
    return inner, "<s>"


def gpt2():
    return Gpt2Tokenizer().build().inner, "<|endoftext|>"


@pytest.mark.parametrize(
    "make",
    [
        unigram,
        words,
        words_without_a_list,
        word_pieces,
        whole_words_of_a_bpe,
        merged_by_a_bpe,
        gpt2,
    ],
)
def test_text_that_spells_a_special_token_stays_text(make):
    inner, name = make()
    built = LibraryTokenizer(inner, name)
    text, plain = f"a {name} a", "a a"
    ids = built.encode_documents([text])[0].tolist()
    assert built.eos_id not in ids and len(ids) >= 3
    assert built.eos_id in built.encode_documents([text], "parse")[0]
    assert built.eos_id in built.encode_prompt(text)
    for each in (plain, "a"):  # nothing else has changed
        both = [built.encode_documents([each], mode)[0].tolist() for mode in ("text", "parse")]
        assert both[0] == both[1]
    pieces = [Piece(text, True), Piece(plain, True), Piece(name * 2, True)]
    for mode in ("text", "parse"):
        assert encode(built, built.eos_id, "uint16", mode, pieces).spelled == {name: 3}


def test_an_added_token_that_is_not_special_stays_a_token():
    inner = Gpt2Tokenizer().build().inner
    inner.add_tokens(["zebra"])
    built = LibraryTokenizer(inner, "<|endoftext|>")
    (ids,) = built.encode_documents(["a zebra <|endoftext|>"])
    assert 50257 in ids and 50256 not in ids
    spec = json.loads(BpeTokenizer(vocab_size=300).learn([lambda: iter(["a b"])]).to_text())
    spec["added_tokens"][0] |= {"special": False, "content": "a"}
    spec["added_tokens"][0]["id"] = spec["model"]["vocab"]["a"]
    built = tokenizer_from_text(json.dumps(spec), None, "x")
    assert built.encode_documents(["ba"])[0].tolist() == built.encode_prompt("ba")


def request_for(tmp_path, tokenizer, **more):
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"a <|endoftext|> {i}"}) + "\n" for i in range(5)))
    return CacheRequest("train", UrlsSource([str(path)]), "train", tokenizer, **more)


@pytest.mark.parametrize("mode", ["text", "parse"])
def test_the_cache_counts_what_texts_spell(tmp_path, caplog, mode):
    tokenizer = Gpt2Tokenizer().build()
    request = request_for(tmp_path, tokenizer, special_tokens=mode)
    cache = open_cache(request, CacheDir(str(tmp_path / "cache")))
    ids = cache.store.read(0, cache.store.num_tokens)
    assert (ids == tokenizer.eos_id).sum() == (5 if mode == "text" else 10)
    assert f"5 times (<|endoftext|> 5); {'they stay' if mode == 'text' else 'each'}" in caplog.text
    ledger = json.loads((tmp_path / "cache/train/ledger.json").read_text())
    assert ledger["special_tokens"] == {"<|endoftext|>": 5}
    caplog.clear()
    open_cache(request, CacheDir(str(tmp_path / "cache")))
    assert "spells" not in caplog.text  # once


def test_a_cache_of_another_meaning_is_not_used(tmp_path):
    tokenizer, where = Gpt2Tokenizer().build(), CacheDir(str(tmp_path / "cache"))
    parse = request_for(tmp_path, tokenizer, special_tokens="parse")
    open_cache(parse, where)
    assert "special_tokens" not in parse.key(None)  # as the caches of earlier versions
    with pytest.raises(DataError, match=r"data\.special_tokens: parse keeps this cache"):
        open_cache(request_for(tmp_path, tokenizer), where)
    rebuilt = open_cache(request_for(tmp_path, tokenizer, rebuild=True), where)
    assert (rebuilt.store.read(0, rebuilt.store.num_tokens) == tokenizer.eos_id).sum() == 5
    with pytest.raises(DataError, match=r"data\.special_tokens: text keeps this cache"):
        open_cache(parse, where)


def test_the_setting_means_nothing_to_bytes(tmp_path):
    where, tokenizer = CacheDir(str(tmp_path / "cache")), BytesTokenizer().build()
    open_cache(request_for(tmp_path, tokenizer, special_tokens="parse"), where)
    open_cache(request_for(tmp_path, tokenizer), where)


def saved(folder, inner=None, **files):
    folder.mkdir(exist_ok=True)
    (inner or word_level()).save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return PretrainedTokenizer(str(folder))


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<stop>"}},
        {"tokenizer_config": {"eos_token": {"content": "<stop>", "__type": "AddedToken"}}},
        {"special_tokens_map": {"eos_token": {"content": "<stop>"}}},
        {"tokenizer_config": {"eos_token": None}, "special_tokens_map": {"eos_token": "<stop>"}},
        {"tokenizer_config": {}, "config": {"eos_token_id": 3}},
        {"config": {"eos_token_id": [99, 3, 2]}},
        {"config": {"eos_token_id": None}, "generation_config": {"eos_token_id": [3, 2]}},
        {"tokenizer_config": {"eos_token": "<stop>"}, "config": {"eos_token_id": 2}},
    ],
)
def test_the_end_is_where_hugging_face_names_it(tmp_path, files):
    assert saved(tmp_path, **files).build().eos_id == 3
    by_file = PretrainedTokenizer(str(tmp_path / "tokenizer.json"))
    assert by_file.build().eos_id == 3
    assert PretrainedTokenizer(str(tmp_path), eos="</s>").build().eos_id == 2


def test_an_end_that_the_tokenizer_does_not_have(tmp_path):
    config = saved(tmp_path, tokenizer_config={"eos_token": "<end>"})
    with pytest.raises(DataError, match=r"eos_token = <end> .* set data.tokenizer.eos \(.*<stop>"):
        config.build()
    assert PretrainedTokenizer(str(tmp_path), eos="<stop>").build().eos_id == 3


def test_without_an_end_documents_are_not_joined_silently(tmp_path, caplog):
    inner = Tokenizer(models.WordLevel({"[UNK]": 0, "<|bos|>": 1, "<|eos|>": 2}, unk_token="[UNK]"))
    inner.add_special_tokens(["<|bos|>", "<|eos|>"])
    tokenizer = LibraryTokenizer(inner)
    assert tokenizer.eos_id is None
    where = CacheDir(str(tmp_path / "cache"))
    says = r"data.enforce_eos = true - .*data.tokenizer.eos.*has <\|bos\|>, <\|eos\|>"
    with pytest.raises(DataError, match=says):
        open_cache(request_for(tmp_path, tokenizer), where)
    open_cache(request_for(tmp_path, tokenizer, enforce_eos=False), where)
    chars = CharsTokenizer().learn([lambda: iter(["a <|endoftext|> 01234"])])
    with caplog.at_level(logging.WARNING):
        open_cache(request_for(tmp_path, chars), CacheDir(str(tmp_path / "chars")))
    assert "data.tokenizer.eos: true" in caplog.text


def test_a_word_for_which_there_is_no_token():
    inner = Tokenizer(models.WordLevel({"the": 0, "</s>": 1}))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    built = LibraryTokenizer(inner)
    says = r"no token for 'zebra', and none for unknown words - add an unknown token"
    for run in (built.encode_prompt, lambda text: built.encode_documents([text])):
        with pytest.raises(DataError, match=says):
            run("the the zebra")


@pytest.mark.parametrize("prefix", ["", "./"])
def test_a_folder_with_a_sentencepiece_model_only(tmp_path, monkeypatch, prefix):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tok").mkdir()
    with pytest.raises(DataError, match=r"tok/tokenizer\.json does not exist"):
        PretrainedTokenizer(f"{prefix}tok").build(offline=True)
    (tmp_path / "tok" / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    for name in ("tok", "tok/tokenizer.model", "tok/tokenizer.json"):
        with pytest.raises(DataError, match=r"tok/tokenizer\.model is a SentencePiece model"):
            PretrainedTokenizer(prefix + name).build(offline=True)
