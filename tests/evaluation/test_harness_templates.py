"""Benchmarks with tokenizers whose template puts something around a text."""

import pytest
import torch
from tiny_run import WORDS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers_weights import randomize

from ostro.data.tokenizer import LibraryTokenizer
from ostro.evaluation import harness
from ostro.models import Gpt2Config
from ostro.models.hf import write_hf

CONFIG = Gpt2Config(seq_len=48, hidden_dim=32, num_layers=2, num_heads=2)
NAMES = [("<s>", 0), ("</s>", 1)]
PAIRS = [
    ("the quick brown", " fox"),
    ("the quick brown", " fox jumps over"),
    ("the qui", "ck fox"),
    ("", "the fox"),
    ("<s>the quick", " fox"),
]


class Request:
    """The part of the harness's requests that a model sees."""

    def __init__(self, *args):
        self.args = args


def tokenizer_of(template, names):
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    inner.train_from_iterator([" ".join(WORDS)], trainer)
    inner.post_processor = processors.TemplateProcessing(single=template, special_tokens=NAMES)
    return LibraryTokenizer(inner, "</s>", {"tokenizer_config": {"eos_token": "</s>", **names}})


@pytest.mark.parametrize(
    ("template", "of_hf", "names", "settings"),
    [
        ("<s> $A", "<s> $A", {"bos_token": "<s>"}, {}),
        # Without the end in its template, `hf` asks the same questions.
        ("<s> $A </s>", "<s> $A", {"bos_token": "<s>"}, {}),
        ("$A </s>", "$A </s>", {}, {"add_bos_token": False}),
    ],
)
def test_contexts_are_open_as_those_of_hf(tmp_path, template, of_hf, names, settings):
    from lm_eval.models.huggingface import HFLM

    tokenizer = tokenizer_of(template, names)
    model = CONFIG.build(tokenizer.vocab_size)
    randomize(model)
    written = tokenizer_of(of_hf, names)
    weights = dict(model.named_parameters())
    write_hf(str(tmp_path / "hf"), CONFIG, weights, written.to_text(), written.eos_id)
    theirs = HFLM(str(tmp_path / "hf"), dtype="float32", device="cpu", batch_size=2, **settings)
    ours = harness._adapter(model.eval(), tokenizer, batch_size=2)
    requests = [Request(*pair) for pair in PAIRS]
    with torch.no_grad():
        expected = theirs.loglikelihood(requests, disable_tqdm=True)
    found = ours.loglikelihood(requests, disable_tqdm=True)
    assert [score for score, _ in found] == pytest.approx([s for s, _ in expected], rel=1e-5)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    rolling = [Request("the quick brown fox")]
    expected = theirs.loglikelihood_rolling(rolling, disable_tqdm=True)
    assert ours.loglikelihood_rolling(rolling) == pytest.approx(expected, rel=1e-5)
    request = [Request("the quick", {"until": ["\n"], "max_gen_toks": 6})]
    assert ours.generate_until(request) == theirs.generate_until(request, disable_tqdm=True)


def test_every_token_of_an_answer_counts():
    tokenizer = tokenizer_of("$A </s>", {})
    model = CONFIG.build(tokenizer.vocab_size)
    randomize(model)
    adapter, context, answer = harness._adapter(model, tokenizer, 2), "the quick", " fox"
    asked = []
    adapter._loglikelihood_tokens = lambda requests, **_: asked.extend(requests)
    adapter.loglikelihood([Request(context, answer)], disable_tqdm=True)
    ((_, before, after),) = asked
    assert tokenizer.decode([*before, *after]) == context + answer
    assert after == tokenizer.encode_prompt(answer) and 1 not in before
