"""`ostro why`: the documents it names are those of the batch, and their losses those of the run."""

import json
import random
import shutil

import numpy as np
import pytest
import torch
from tiny_run import WORDS, merge, ostro, read_metrics, write_config

from ostro.checkpoint import load
from ostro.cli.arguments import load_run
from ostro.cli.main import run_command
from ostro.data.loader import Loader
from ostro.inspect.why import batch_losses, explain, logged_loss
from ostro.train_lm import build_data, load_model, load_tokenizer

EOS = 256  # of the tokenizer `bytes`


def write_documents(path, count, name):
    """JSON lines of documents that no other file has, and a blank line before every third."""
    drawn = random.Random(name)
    with open(path, "w") as file:
        for number in range(count):
            text = f"{name}{number} " + " ".join(drawn.choices(WORDS, k=drawn.randint(1, 12)))
            file.write("\n" * (number % 3 == 0) + json.dumps({"text": text}) + "\n")
    return str(path)


def tokens_of(file, record):
    """The tokens of a document, from its file."""
    with open(file, encoding="utf-8") as lines:
        return [*json.loads(lines.read().splitlines()[record - 1])["text"].encode(), EOS]


MIXED = {
    "train_urls": [],
    "validation_urls": [],
    "configs": {"a": {"train_urls": ["a.jsonl"]}, "b": {"train_urls": ["b.jsonl", "c.jsonl"]}},
    "train_weights": [
        {"start": 0, "weights": {"a": 0.7, "b": 0.3}},
        {"start": 2, "weights": {"a": 0.2, "b": 0.8}},
    ],
    "mixture_block_size": 8,
}


@pytest.mark.parametrize(
    ("data", "trainer"),
    [
        ({}, {}),
        ({"shuffle": False, "document_mask": True}, {}),
        ({"shuffle": 3, "validation_urls": [], "num_validation_sequences": 5}, {"seed": 3}),
        ({"sampling": "windows"}, {}),
        ({}, {"train_batch_size": [{"start": 0, "value": 2}, {"start": 2, "value": 6}]}),
        (MIXED, {}),
    ],
)
def test_the_documents_named_are_those_of_the_batch(tmp_path, monkeypatch, data, trainer):
    monkeypatch.chdir(tmp_path)
    for name in "abc":
        write_documents(tmp_path / f"{name}.jsonl", 40, name)
    path = write_config(tmp_path, data={"train_urls": ["a.jsonl", "c.jsonl"]} | data)
    config = load_run(str(path), ["--trainer", json.dumps(trainer)] if trainer else []).config
    tokenizer = config.data.build_tokenizer()
    data = build_data(config, tokenizer)
    loader = Loader(data.train, config.trainer.batch_schedule())
    for step in range(6):
        batch = loader.batch(step)
        found = explain(config, data, tokenizer, step, None)
        assert found.batch_size == len(batch.tokens)
        for example, (tokens, targets) in enumerate(zip(batch.tokens, batch.targets, strict=True)):
            own = [document for document in found.documents if document.example == example]
            named = []
            for d in own:
                document = tokens_of(d.file, d.record)
                named += document[d.token : d.token + d.num_tokens]
                assert bytes(document[:-1]).decode().startswith(d.first_words)
                assert bytes(document[d.token :][:-1]).decode().strip().startswith(d.words)
                assert d.source == ("data" if not config.data.configs else min(d.file[0], "b"))
            seen = [int(tokens[0]), *(int(token) for token in targets if token >= 0)]
            assert named == seen
            assert sum(d.num_predicted for d in own) == len(seen) - 1


MODELS = [
    ({"type": "gpt2"}, {"document_mask": True}, {"per_device_parallelism": 2}),
    ({"type": "llama", "num_kv_heads": 1}, {}, {"checkpointer": {"format": "file"}}),
]


@pytest.mark.parametrize(("model", "data", "trainer"), MODELS)
def test_the_losses_are_those_of_the_run(tmp_path, capsys, model, data, trainer):
    keep = {"checkpointer": {"keep": [{"every": 1}]}}
    path = write_config(tmp_path, model=model, data=data, trainer=merge(trainer, keep))
    assert run_command(["train", "--config_path", str(path)]) == 0
    logged = read_metrics(tmp_path)
    capsys.readouterr()
    for step in range(2, 6):  # there is none after update 0
        words = ["--step", str(step), "--checkpoint", str(tmp_path / "checkpoints/tiny"), "--json"]
        assert run_command(["why", *words]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["weights"]["step"] == step - 1
        assert found["logged_loss"] == logged[step]
        assert found["mean_loss"] == pytest.approx(logged[step], abs=1e-5)
        documents = [d for d in found["documents"] if d["num_predicted"]]
        count = sum(d["num_predicted"] for d in documents)
        together = sum(d["loss"] * d["num_predicted"] for d in documents)
        assert together / count == pytest.approx(found["mean_loss"], abs=1e-9)
        losses = [d["loss"] for d in documents]
        assert losses == sorted(losses, reverse=True)


def test_the_loss_of_a_document_is_that_of_its_tokens(tmp_path):
    texts = [write_documents(tmp_path / "a.jsonl", 40, "a")]
    path = write_config(tmp_path, data={"train_urls": texts, "document_mask": True})
    assert run_command(["train", "--config_path", str(path)]) == 0
    saved = load(str(tmp_path / "checkpoints/tiny/step-5"))
    config, tokenizer = load_run(str(path), []).config, load_tokenizer(saved)
    model = load_model(saved, config, tokenizer, torch.device("cpu"))
    data = build_data(config, tokenizer)
    found = explain(config, data, tokenizer, 3, model)
    batch = Loader(data.train, config.trainer.batch_schedule()).batch(3)
    with torch.no_grad():
        logits = model(batch.tokens, segments=batch.segments)
    nats = -logits.log_softmax(-1).gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(batch_losses(model, batch).float(), nats, atol=1e-5)
    at = dict.fromkeys(range(4), -1)  # position that predicts the next token
    for d in found.documents:
        start = max(at[d.example], 0)
        at[d.example] += d.num_tokens
        own = nats[d.example, start : at[d.example]]
        assert d.num_predicted == len(own)
        assert d.loss == (pytest.approx(float(own.mean()), abs=1e-5) if len(own) else None)
    assert set(at.values()) == {16}


def test_a_poisoned_document_comes_first(tmp_path, capsys):
    lines = [json.dumps({"text": " ".join(WORDS[:6])})] * 200
    noise = "".join(map(chr, random.Random(0).choices(range(33, 127), k=60)))
    lines[123] = json.dumps({"text": noise})
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n")
    path = write_config(
        tmp_path,
        data={"train_urls": [str(tmp_path / "train.jsonl")]},
        trainer={"num_train_steps": 40, "checkpointer": {"keep": [{"every": 20}]}},
    )
    assert run_command(["train", "--config_path", str(path)]) == 0
    config = load_run(str(path), []).config
    tokenizer = config.data.build_tokenizer()
    data = build_data(config, tokenizer)

    def poisoned(step):
        return any(d.record == 124 for d in explain(config, data, tokenizer, step, None).documents)

    (tmp_path / "train.jsonl").unlink()  # it takes the cache alone
    steps = [step for step in range(21, 40) if poisoned(step)]
    assert steps
    capsys.readouterr()
    assert run_command(["why", "--step", str(steps[0]), "--config_path", str(path)]) == 0
    out = capsys.readouterr().out.splitlines()
    header = next(index for index, line in enumerate(out) if line.split()[:2] == ["loss", "tokens"])
    assert f"{tmp_path}/train.jsonl:124" in out[header + 1]
    assert noise[:12] in out[header + 1]
    assert "losses of the weights after update 20" in "\n".join(out[:header])


def test_token_files_are_named_with_the_token(tmp_path):
    tokens = np.arange(400, dtype="<u2") % 200
    tokens[250] = EOS
    for name, part in (("one", tokens[:150]), ("two", tokens[150:])):
        part.tofile(tmp_path / f"{name}.bin")
    files = [str(tmp_path / "one.bin"), str(tmp_path / "two.bin")]
    source = {"type": "tokens", "train_bin": files}
    data = {"train_urls": [], "validation_urls": [], "source": source}
    config = load_run(str(write_config(tmp_path, data=data)), []).config
    tokenizer = config.data.build_tokenizer()
    data = build_data(config, tokenizer)
    seen, loader = set(), Loader(data.train, config.trainer.batch_schedule())
    for step in range(6):
        batch = loader.batch(step)
        for d in explain(config, data, tokenizer, step, None).documents:
            stored = np.fromfile(d.file, "<u2")[d.token : d.token + d.num_tokens].tolist()
            row = [*batch.tokens[d.example].tolist(), int(batch.targets[d.example, -1])]
            at = row.index(stored[0])
            assert row[at : at + len(stored)] == stored
            assert EOS not in stored[:-1]
            seen |= {(d.file, token) for token in range(d.token, d.token + d.num_tokens)}
    assert 6 * 4 * 16 <= len(seen) <= 400  # all windows but one have been looked at


def test_the_last_line_of_a_step_counts(tmp_path):
    log = tmp_path / "metrics.jsonl"
    assert logged_loss(log, 1) is None
    events = [{"step": 1, "train/loss": 3.0}, {"step": 1, "event": "resume"}]
    events += [{"step": 11, "train/loss": 9.0}, {"step": 1, "train/loss": 2.5}]
    text = "".join(json.dumps(event) + "\n" for event in events)
    log.write_text(text + '{"step": 1, "train/loss": 7')
    assert logged_loss(log, 1) == 2.5
    assert logged_loss(log, 2) is None


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The configuration of a short run that is finished, with its text gone."""
    folder = tmp_path_factory.mktemp("run")
    path = write_config(folder, trainer={"checkpointer": {"keep": [{"every": 2}]}})
    assert run_command(["train", "--config_path", str(path)]) == 0
    (folder / "train.txt").unlink()
    return path


def test_as_a_command(run):
    result = ostro("why", "--step", 4, "--config_path", run, "--json", "--top", 2)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["weights"]["step"], len(found["documents"])) == (2, 2)
    assert "this update began with those after update 3" in found["notes"][0]
    document = found["documents"][0]
    assert document["file"] == str(run.parent / "train.txt")
    assert (document["record"], document["byte"]) == (1, 0)


def said(capsys, run, *words):
    """What the command prints when all is well."""
    assert run_command(["why", "--config_path", str(run), *words]) == 0
    return capsys.readouterr().out


def test_which_weights_are_taken(run, capsys):
    assert "no losses: no checkpoint from before this update" in said(capsys, run, "--step", "2")
    begun = said(capsys, run, "--step", "3")
    assert "after update 2: those that this update began with" in begun
    last = run.parent / "checkpoints/tiny/step-5"
    assert "been trained on this batch" in said(
        capsys, run, "--step", "3", "--checkpoint", str(last)
    )
    assert "warning: that checkpoint was trained on other data, or in another order" in said(
        capsys, run, "--step", "3", "--data_seed", "9"
    )
    assert run_command(["why", "--step", "3", "--checkpoint", str(last), "--sort", "example"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in out[-4:]] == ["0", "1", "2", "3"]
    skip = ["--trainer.skip_steps", "[{first: 2, last: 3}]"]
    assert "trainer.skip_steps leaves this batch out" in said(capsys, run, "--step", "3", *skip)
    assert "leaves this batch out" not in said(capsys, run, "--step", "4", *skip)


def test_a_damaged_checkpoint_is_passed_over(tmp_path, run, capsys, caplog):
    copy = shutil.copytree(run.parent / "checkpoints", tmp_path / "copy")
    with open(copy / "tiny/step-4/model.safetensors", "ab") as file:
        file.truncate(file.tell() - 1)
    out = said(capsys, run, "--step", "5", "--checkpoint", str(copy))
    assert "losses of the weights after update 2: this update began with those after" in out
    assert "skipping a damaged checkpoint" in caplog.text


def test_a_run_without_an_id_has_no_checkpoints(tmp_path, run, capsys, monkeypatch):
    monkeypatch.delenv("RUN_ID", raising=False)
    assert "no losses: no checkpoint from before this update in a run without trainer.id" in said(
        capsys, run, "--step", "3", "--trainer.id", "null"
    )


def test_a_cache_without_an_index_says_what_it_cannot_name(tmp_path, capsys):
    path = write_config(tmp_path)
    assert run_command(["cache", "--config_path", str(path)]) == 0
    ledger = tmp_path / "cache/train/ledger.json"
    content = json.loads(ledger.read_text())
    del content["index"]
    ledger.write_text(json.dumps(content))
    out = said(capsys, path, "--step", "0")
    assert "made before documents were indexed, and their files cannot be named" in out
    assert str(tmp_path / "cache/train/tokens-00000.bin") in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--step", "6"], "--step = 6 - the run makes updates 0 to 5"),
        (["--step", "-1"], "--step = -1 - the run makes updates 0 to 5"),
        (["--step", "x"], "argument --step: invalid int value: 'x'"),
        ([], "the following arguments are required: --step"),
        (["--step", "0", "--topp", "3"], "topp"),
        (["--step", "0", "--top", "0"], "--top = 0 - must be at least 1"),
        (["--step", "0", "--checkpoint", "nowhere"], "no complete checkpoint there or below"),
        (["--step", "0", "--data.cache_dir", "other"], "no finished cache - make it with `ostro c"),
        (["--step", "0", "--data.tokenizer", "chars"], "other/tokenizer - holds no finished cache"),
        (["--step", "0", "--data.enforce_eos", "false"], "does not fit the configuration"),
        (
            ["--step", "0", "--data.enforce_eos", "false", "--data.rebuild_cache", "true"],
            "does not fit the configuration",
        ),
    ],
)
def test_mistakes(run, capsys, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    if "chars" in words:
        words = [*words, "--data.cache_dir", "other"]
    assert run_command(["why", "--config_path", str(run), *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("ostro: error: ") and err.count("Traceback") == 0
    assert list(tmp_path.iterdir()) == []  # nothing is built


def test_a_run_has_to_be_named(capsys):
    assert run_command(["why", "--step", "0"]) == 2
    assert "needs a run - give --config_path FILE or --checkpoint PATH" in capsys.readouterr().err
