"""Benchmarks: the same answers and scores as the harness's own model for the same weights."""

import pytest
import torch
from benchmark_model import SEQ_LEN, WORDS, write_copies, write_model, write_tasks

from ostro import kernels
from ostro.checkpoint import find_latest
from ostro.cli.benchmark import table
from ostro.cli.native import saved_config
from ostro.core.errors import ConfigError, DataError
from ostro.evaluation import _squad as squad
from ostro.evaluation import harness
from ostro.train_lm import load_model, load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
DOCUMENTED = ["superglue", "lambada", "triviaqa", "piqa"]
LOCAL = ["local_piqa", "local_boolq", "local_lambada", "local_triviaqa", "local_text"]
TEXT = " ".join(WORDS)


class Request:
    """The part of the harness's requests that a model sees."""

    def __init__(self, *args):
        self.args = args
        self.task_name = "test"


@pytest.fixture(scope="module", autouse=True)
def data_cache(tmp_path_factory):
    """Data sets made from the tests' files are not kept in the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        folder = str(tmp_path_factory.mktemp("data_sets"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        yield


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Our model and tokenizer, our adapter, and the harness's own model."""
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("benchmarks")
    checkpoint, exported = write_model(folder)
    saved = find_latest(str(checkpoint), weights=True)
    tokenizer = load_tokenizer(saved)
    model = load_model(saved, saved_config(saved, None), tokenizer, torch.device("cpu"))
    theirs = HFLM(str(exported), dtype="float32", device="cpu", batch_size=3)
    return model, tokenizer, harness._adapter(model, tokenizer, batch_size=5), theirs


@pytest.fixture(scope="module")
def tasks(tmp_path_factory, models):
    """A folder of small tasks; the model is right now and then."""
    folder = tmp_path_factory.mktemp("tasks")
    until = {"until": ["\n", ".", ","], "max_gen_toks": 8}
    return write_tasks(folder, lambda text: models[3].generate_until([Request(text, until)])[0])


def same(ours, theirs):
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    assert [score for score, _ in ours] == pytest.approx([s for s, _ in theirs], rel=1e-5, abs=1e-4)


def test_log_likelihoods_of_short_long_and_empty_contexts(models):
    _, tokenizer, ours, theirs = models
    pairs = [
        ("the quick brown", " fox"),
        ("the quick brown", " fox jumps"),
        ("the quick brown ", "fox"),  # the space moves to the answer
        ("the qui", "ck fox jumps"),  # encoded together
        ("", "the fox"),
        ("", "<|endoftext|>the fox"),
        (TEXT, " the lazy dog"),
        (TEXT + TEXT, " a"),
        ("the", TEXT[:60]),
        ("é \n\n", "ü"),
    ]
    exact = tokenizer.decode(tokenizer.encode_prompt(TEXT * 2)[:SEQ_LEN])
    pairs += [(exact, " fox"), (exact[:-1], " fox"), (exact[:-9], " fox")]
    requests = [Request(*pair) for pair in pairs]
    found = ours.loglikelihood(requests, disable_tqdm=True)
    same(found, theirs.loglikelihood(requests, disable_tqdm=True))
    assert len({score for score, _ in found}) == len(pairs) - 2  # two are said in two ways


def test_the_likeliest_of_all_tokens_is_greedy(models):
    model, tokenizer, ours, theirs = models
    contexts = [tokenizer.encode_prompt(text) for text in ("seven wizards", "an", TEXT)]
    requests = [(("", ""), each, [t]) for each in contexts for t in range(tokenizer.vocab_size)]
    rows = []
    hook = model.blocks[0].register_forward_hook(lambda _, args, out: rows.append(len(args[0])))
    found = ours._loglikelihood_tokens(requests)
    hook.remove()
    same(found, theirs._loglikelihood_tokens(requests, disable_tqdm=True))
    assert sum(greedy for _, greedy in found) == 3
    assert sum(rows) == 3  # pairs that differ in their last token only share a pass


@pytest.mark.parametrize("num_words", [0, 1, 30, 200])
def test_rolling_log_likelihoods(models, num_words):
    _, _, ours, theirs = models
    requests = [Request(" ".join((WORDS * 9)[:num_words])), Request("an old bridge")]
    found = ours.loglikelihood_rolling(requests)
    expected = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)
    assert (found[0] == 0) == (num_words == 0)


def test_generated_answers(models):
    _, tokenizer, ours, theirs = models
    contexts = ["the", "seven wizards mix", TEXT, TEXT + TEXT, "why knows nobody a"]
    settings = [{"until": ["\n"], "max_gen_toks": 12}, {"until": ["e", "o"], "max_gen_toks": 30}]
    requests = [Request(context, each) for context in contexts for each in settings]
    found = ours.generate_until(requests)
    assert found == theirs.generate_until(requests, disable_tqdm=True)
    assert len(set(found)) > 5
    ids = [tokenizer.encode_prompt(text) for text in found[::2]]
    assert max(map(len, ids)) >= 12  # some go on to the end


def test_an_empty_prompt_and_too_long_an_answer_have_an_answer_too(models, caplog):
    _, _, ours, _ = models
    assert isinstance(ours.generate_until([Request("", {"until": ["\n"]})])[0], str)
    assert "leave no room" in caplog.text


def test_an_answer_ends_at_its_stop(models):
    model, tokenizer, _, _ = models
    kernels.enable(False)  # whose steps call no module
    steps = []
    hook = model.blocks[0].register_forward_hook(lambda *_: steps.append(1))
    long = harness.write_until(model, tokenizer, [("the", {"max_gen_toks": 30})], 1)[0]
    whole = len(steps)
    stop = long[2]
    short = harness.write_until(model, tokenizer, [("the", {"max_gen_toks": 30, "until": stop})], 1)
    hook.remove()
    assert short == [long.split(stop)[0]]
    assert len(steps) - whole < whole


def test_drawn_answers_differ_where_a_question_is_repeated(models):
    model, tokenizer, _, _ = models
    drawn = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "top_k": 50}
    found = harness.write_until(model, tokenizer, [("the", drawn)] * 6, 2)
    assert len(set(found)) > 3
    assert found == harness.write_until(model, tokenizer, [("the", drawn)] * 6, 2)


def test_an_answer_longer_than_the_model_reads(models):
    with pytest.raises(DataError, match=f"seq_len = {SEQ_LEN}"):
        models[2].loglikelihood([Request("the", TEXT * 2)], disable_tqdm=True)


def test_scores_equal_those_of_the_harness(models, tasks):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, tokenizer, _, theirs = models
    benchmarks = harness.load_benchmarks(LOCAL, str(tasks))
    found = harness.run_harness(model, tokenizer, benchmarks, batch_size=4)
    manager = TaskManager(include_defaults=False, include_path=str(tasks))
    expected = simple_evaluate(
        theirs, tasks=LOCAL, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    values = {}
    for name in LOCAL:
        for key, value in found[name]["results"][name].items():
            if "_stderr" not in key:
                values[name, key] = value
                assert value == pytest.approx(expected["results"][name][key], rel=1e-5), (name, key)
    assert len(values) == 9
    assert 0 < values["local_triviaqa", "exact_match,none"] < 1
    assert found["local_piqa"]["num_fewshot"] == {"local_piqa": 1}
    text = "\n".join(table(found))
    assert "local_text" in text and "bits_per_byte" in text and "_stderr" not in text


@pytest.mark.filterwarnings("ignore:F-score is ill-defined")  # of a class without questions
def test_the_documented_benchmarks_by_their_own_descriptions(models, tasks, tmp_path, monkeypatch):
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    model, tokenizer, _, theirs = models
    harness.task_manager(str(tasks))  # prepares for SuperGLUE; its index is not needed
    manager = TaskManager(include_defaults=False, include_path=str(write_copies(tmp_path)))
    monkeypatch.setattr(harness, "task_manager", lambda _: manager)
    benchmarks = harness.load_benchmarks(DOCUMENTED)
    found = harness.run_harness(model, tokenizer, benchmarks)
    every = [task for tasks in benchmarks.values() for task in tasks]
    expected = simple_evaluate(
        theirs, tasks=every, task_manager=manager, bootstrap_iters=0, log_samples=False
    )
    assert len(expected["results"]) == 8 + 2 + 1 + 1
    for own in found.values():
        for task, scores in own["results"].items():
            for key in (key for key in scores if "_stderr" not in key):
                assert scores[key] == pytest.approx(expected["results"][task][key], rel=1e-5)


@pytest.mark.parametrize(
    ("gold", "predicted", "exact", "f1"),
    [
        ("The Cat!", "a cat", 1, 1.0),
        ("the cat sat", "a cat", 0, 2 / 3),
        ("one two three", "two two four", 0, 1 / 3),
        ("the", "a", 1, 1.0),
        ("the", "cat", 0, 0.0),
    ],
)
def test_agreement_of_answers(gold, predicted, exact, f1):
    assert squad.compute_exact(gold, predicted) == exact
    assert squad.compute_f1(gold, predicted) == pytest.approx(f1)


def test_limit_fewshot_and_groups(models, tasks):
    model, tokenizer, _, _ = models
    benchmarks = harness.load_benchmarks(["local_group", "local_boolq"], str(tasks))
    found = harness.run_harness(model, tokenizer, benchmarks, limit=3, num_fewshot=2)
    assert set(found["local_group"]["results"]) == {"local_group", "local_boolq", "local_lambada"}
    assert found["local_boolq"]["num_fewshot"] == {"local_boolq": 2}
    assert found["local_boolq"]["results"]["local_boolq"]["acc,none"] * 3 % 1 == pytest.approx(0)


def test_documented_names_are_in_the_index_of_the_harness(tasks):
    manager = harness.task_manager(str(tasks))
    index = manager.task_index
    kinds = {name: index[harness.ALIASES.get(name, name)] for name in DOCUMENTED}
    types = {
        name: {index[task].cfg["output_type"] for task in entry.tags or {entry.name}}
        for name, entry in kinds.items()
    }
    assert types == {
        "superglue": {"multiple_choice"},
        "lambada": {"loglikelihood"},
        "triviaqa": {"generate_until"},
        "piqa": {"multiple_choice"},
    }
    parts = {"boolq", "cb", "copa", "multirc", "record", "sglue_rte", "wic", "wsc"}
    assert kinds["superglue"].tags == parts


def test_wrong_names_come_together_with_the_nearest(tasks):
    with pytest.raises(ConfigError) as wrong:
        harness.load_benchmarks(["superglu", "local_piqa", "lambda"], str(tasks))
    assert [problem.value for problem in wrong.value.problems] == ["superglu", "lambda"]
    assert "did you mean superglue?" in str(wrong.value)
    assert "did you mean lambada?" in str(wrong.value)


def test_a_data_set_that_cannot_be_had(tasks):
    with pytest.raises(DataError, match=r"--benchmark local_lost .*HF_HOME.*--task_folder"):
        harness.load_benchmarks(["local_boolq", "local_lost"], str(tasks))
