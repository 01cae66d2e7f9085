"""Generation: the cache changes nothing, rows are independent, draws follow the distribution."""

from dataclasses import replace

import numpy as np
import pytest
import tokenizers
import torch

from ostro import kernels
from ostro.data.tokenizer import LibraryTokenizer, Tokenizer
from ostro.generate import cpu_decoder
from ostro.generate.sampling import SamplingConfig, choose, complete_all, generate
from ostro.models import Gpt2Config, LlamaConfig, initialize

VOCAB = 40
GPT2 = Gpt2Config(
    seq_len=16, hidden_dim=32, num_layers=2, num_heads=4, initializer_range=0.3, resid_pdrop=0.2
)
LLAMA = LlamaConfig(
    seq_len=16,
    hidden_dim=32,
    intermediate_dim=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    initializer_range=0.3,
)
BOTH = pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
PROMPTS = [[3, 1, 4], [1], [5, 9, 2, 6, 5, 3, 5, 8, 9], list(range(30))]


def built(config):
    model = config.build(VOCAB)
    initialize(model, 0)
    return model


def without_cache(model, prompt, num_tokens):
    """Greedy, one prompt, the whole context computed again for every token."""
    model.eval()
    context, written = list(prompt)[-16:], []
    for _ in range(num_tokens):
        if len(context) > 16:
            context = context[-8:]
        token = int(model(torch.tensor([context]))[0, -1].argmax())
        context.append(token)
        written.append(token)
    return written


@BOTH
def test_batch_with_cache_equals_each_prompt_without(config):
    model = built(config)
    expected = [without_cache(model, prompt, 40) for prompt in PROMPTS]  # past seq_len, twice
    assert len({tuple(tokens) for tokens in expected}) == len(PROMPTS)
    found = generate(model, PROMPTS, max_new_tokens=40, temperature=0.0)
    assert found == expected


@BOTH
def test_cached_logits_equal_whole_logits(config):
    from ostro.nn import KeyValueCache

    model = built(config).eval()
    tokens = torch.randint(VOCAB, (3, 16), generator=torch.Generator().manual_seed(0))
    whole = model(tokens)
    cache = KeyValueCache(3, 16)
    for first, counts in ((0, [5, 5, 5]), (5, [3, 3, 3]), (8, [1, 1, 1])):
        cache.append(counts)
        last = model(tokens[:, first : first + counts[0]], cache=cache)
        torch.testing.assert_close(last[:, 0], whole[:, first + counts[0] - 1])


NATIVE = pytest.mark.skipif(not kernels.available(), reason="needs a C++ compiler and AVX-512")
BIASED = replace(LLAMA, use_bias=True, tie_word_embeddings=True, activation_function="gelu")
PLAIN = replace(GPT2, use_bias=False, hidden_dim=36, activation_function="relu")


def stepped(model, monkeypatch, tokens):
    """Logits of the native step after each of the tokens but the first."""
    found = []
    step = cpu_decoder.Decoder.step
    monkeypatch.setattr(
        cpu_decoder.Decoder, "step", lambda *args: found.append(step(*args)) or found[-1]
    )
    generate(model, tokens, max_new_tokens=5, temperature=0.0)
    return found


@NATIVE
@pytest.mark.parametrize("config", [GPT2, LLAMA, BIASED, PLAIN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_steps_give_the_logits_of_the_whole_forward(config, dtype, monkeypatch):
    model = config.build(VOCAB, dtype)
    initialize(model, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = stepped(model, monkeypatch, PROMPTS[:3])
    written = generate(model, PROMPTS[:3], max_new_tokens=5, temperature=0.0)
    assert len(found) == 8  # four steps of each call follow that of the prompt
    exact = config.build(VOCAB)
    exact.load_state_dict(model.state_dict())
    for row, (prompt, tokens) in enumerate(zip(PROMPTS[:3], written, strict=True)):
        context = torch.tensor([list(prompt) + tokens])
        whole = exact.eval()(context)[0, len(prompt) : -1].log_softmax(-1)
        steps = torch.stack([logits[row] for logits in found[:4]]).log_softmax(-1)
        error = (steps - whole).abs()
        assert error.max() < 1e-4 if dtype == torch.float32 else error.mean() < 0.06
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name])


@BOTH
def test_without_a_compiler_the_same_tokens(config, monkeypatch):
    model = built(config)
    found = generate(model, PROMPTS, max_new_tokens=20, temperature=0.0)
    monkeypatch.setattr(kernels, "_is_wanted", False)
    monkeypatch.setattr(cpu_decoder.Decoder, "step", None)
    assert generate(model, PROMPTS, max_new_tokens=20, temperature=0.0) == found


def test_same_seed_same_tokens_and_rows_draw_for_themselves():
    model = built(GPT2)
    first = generate(model, PROMPTS, max_new_tokens=12, seed=5)
    assert first == generate(model, PROMPTS, max_new_tokens=12, seed=5)
    assert first != generate(model, PROMPTS, max_new_tokens=12, seed=6)
    alone = generate(model, PROMPTS[1:2], max_new_tokens=12, seed=6)
    assert first[1] == alone[0]
    twice = generate(model, [[7], [7]], max_new_tokens=12)
    assert twice[0] != twice[1]


def test_eos_ends_a_row_and_leaves_the_others():
    model = built(GPT2)
    free = generate(model, PROMPTS, max_new_tokens=20, temperature=0.0)
    eos = free[0][4]
    found = generate(model, PROMPTS, max_new_tokens=20, temperature=0.0, eos_id=eos)
    for row, tokens in zip(found, free, strict=True):
        assert row == (tokens[: tokens.index(eos)] if eos in tokens else tokens)
    assert len(found[0]) <= 4


def test_training_mode_comes_back_and_dropout_is_off():
    model = built(GPT2).train()
    model.blocks[0].requires_grad_(False)
    greedy = generate(model, PROMPTS, max_new_tokens=5, temperature=0.0)
    assert model.training and model.blocks[0].training
    assert greedy == generate(model.eval(), PROMPTS, max_new_tokens=5, temperature=0.0)
    assert not model.training


def test_padding_of_the_vocabulary_is_never_chosen():
    model = built(GPT2)
    found = generate(model, PROMPTS, max_new_tokens=30, temperature=5.0, vocab_size=7)
    assert max(token for row in found for token in row) < 7


def frequencies(logits, **settings):
    uniform = torch.linspace(0, 1, 10_001)[:-1]
    chosen = choose(logits.expand(len(uniform), -1), uniform, **settings)
    return torch.bincount(chosen, minlength=logits.shape[-1]) / len(uniform)


def test_draws_follow_the_softmax():
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        expected = (logits / temperature).softmax(-1)
        torch.testing.assert_close(
            frequencies(logits, temperature=temperature), expected, atol=1e-3, rtol=0
        )
    assert frequencies(logits, temperature=0.0).tolist() == [0, 1, 0, 0]


def test_top_k_and_top_p_keep_the_likeliest():
    probabilities = torch.tensor([0.1, 0.5, 0.3, 0.1])
    logits = probabilities.log()

    def check(expected, **settings):
        found = frequencies(logits, temperature=1.0, **settings)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-3, rtol=0)

    check([0.0, 1.0, 0.0, 0.0], top_k=1)
    check([0.0, 0.625, 0.375, 0.0], top_k=2)
    check([0.1, 0.5, 0.3, 0.1], top_k=99)
    check([0.0, 1.0, 0.0, 0.0], top_p=0.4)
    check([0.0, 0.625, 0.375, 0.0], top_p=0.6)
    check([0.1, 0.5, 0.3, 0.1], top_p=1.0)
    check([0.0, 1.0, 0.0, 0.0], top_k=2, top_p=0.5)


class Letters(Tokenizer):
    """A tokenizer of capital letters."""

    vocab_size, eos_id = 26, None

    def encode_documents(self, texts, special_tokens="text"):
        return [np.array([ord(c) % 26 for c in text]) for text in texts]

    def decode(self, ids):
        return "".join(chr(65 + i) for i in ids)

    token_bytes = to_text = None


def test_complete_goes_on_with_text():
    model, config = built(GPT2), SamplingConfig(max_new_tokens=8, temperature=1.0)
    (text,) = complete_all(model, Letters(), ["HELLO"], config)
    assert text.startswith("HELLO") and len(text) == 13 and text.isupper()
    both = complete_all(model, Letters(), ["HELLO", ""], config)
    assert both[0] == text and len(both[1]) == 8


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_impossible_settings_are_named(change, setting):
    assert [problem.setting for problem in SamplingConfig(**change).problems()] == [setting]
    assert not list(SamplingConfig().problems())


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("AB CD", "AB CD EF"), ("AB CD ", "AB CD EF"), ("AB CD\n", "AB CD\nEF")],
)
def test_text_follows_a_prompt_with_one_space(monkeypatch, prompt, expected):
    """A decoder that puts a space before each word, whatever stood there."""
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"AB": 0, "CD": 1, "EF": 2}, "AB"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    monkeypatch.setattr("ostro.generate.sampling.generate", lambda model, prompts, **_: [[2]])
    tokenizer = LibraryTokenizer(inner)
    tokenizer.eos_id = 0
    assert complete_all(None, tokenizer, [prompt], SamplingConfig()) == [expected]
