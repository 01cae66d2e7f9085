"""`ostro checkpoint`: what it prints, deletes and writes, on the disk and in memory."""

import itertools
import sys

import fsspec
import pytest
import torch
from tiny_run import write_config

from ostro.checkpoint import State, entries, find_latest, load, write
from ostro.checkpoint.folders import FileStore
from ostro.checkpoint.single_file import FORMATS, write_file
from ostro.cli.main import run_command
from ostro.io import filesystem

_counter = itertools.count()


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    """Four checkpoints of one run, of which step 2 is the best, and one of another."""
    root = str(tmp_path / "all") if request.param == "local" else f"memory://all-{next(_counter)}"
    for step in (1, 2, 3, 4):
        marks = {"is_temporary": step == 4, "is_best": step == 2, "timestamp": float(step)}
        write(f"{root}/me", state(step), step=step, run_id="me", **marks)
    write(f"{root}/other", state(9), step=9, run_id="other", is_temporary=False, timestamp=0.0)
    return root


def state(step, **more):
    model = {"weight": torch.full((3, 2), float(step)), "same": torch.ones(2, dtype=torch.bfloat16)}
    values = {"step": step + 1, "eval_loss": 1 / step}
    texts = {"config.yaml": f"trainer: {{id: me, seed: {step}}}\nmodel: {{type: gpt2}}\n"}
    groups = {"model": model | more, "optimizer": {"weight.exp_avg": torch.full((2,), step / 2)}}
    return State(groups, values, texts)


def ostro(capsys, *words, code=0):
    assert run_command(["checkpoint", *words]) == code
    captured = capsys.readouterr()
    return captured.out if code == 0 else captured.out + captured.err


def left(folder):
    return sorted(entry.step for entry in entries(folder))


def test_ls_lists_newest_first(folder, capsys):
    lines = ostro(capsys, "ls", folder).splitlines()[1:]
    assert [int(line.split()[0]) for line in lines] == [4, 3, 2, 1, 9, 5]
    assert "temporary " in lines[0] and "0.2500" in lines[0] and lines[0].endswith("/me/step-4")
    assert "permanent*" in lines[2] and "0.5000" in lines[2]
    assert "other" in lines[4] and lines[5].startswith("5 checkpoints, ")


def test_ls_of_a_file_that_does_not_say_when_it_was_saved(tmp_path, capsys):
    values = {"step": 4}
    write_file(tmp_path / "step_3.pt", FORMATS["file"].pack(State({"model": {}}, values, {})))
    line = ostro(capsys, "ls", str(tmp_path)).splitlines()[1]
    assert line.split()[:3] == ["3", "-", "permanent"]


def damage(folder, step, file, change):
    fs, path = fsspec.url_to_fs(f"{folder}/me/step-{step}/{file}")
    content = fs.cat_file(path)
    fs.pipe_file(path, change(content))


def test_verify_names_what_is_damaged_in_any_way(folder, capsys):
    assert ostro(capsys, "verify", folder).count("intact ") == 5
    damage(folder, 1, "model.safetensors", lambda data: data[:-1] + b"!")
    damage(folder, 2, "optimizer.safetensors", lambda data: data[:-1])
    damage(folder, 3, "metadata.json", lambda data: b"{")
    fs, path = fsspec.url_to_fs(f"{folder}/me/step-4/metadata.json")
    fs.rm_file(path)
    said = ostro(capsys, "verify", folder, code=2)
    assert said.count("intact ") == 1 and "4 of 5 checkpoints are damaged" in said
    assert "step-1/model.safetensors - is damaged: its content differs" in said
    assert "step-2/optimizer.safetensors - is damaged: it has" in said
    assert "step-3/metadata.json - is damaged" in said
    assert "step-4 - has no metadata.json" in said
    assert "is damaged" in ostro(capsys, "verify", f"{folder}/me/step-1", code=2)


def test_prune_deletes_what_was_not_asked_for_in_each_run(folder, capsys):
    assert "there is no terminal" in ostro(capsys, "prune", folder, "--keep_every", "3", code=2)
    assert left(folder) == [1, 2, 3, 4, 9]
    said = ostro(capsys, "prune", folder, "--keep_every", "3", "--yes")
    assert "1 of 5 checkpoints" in said and "/me/step-1\n" in said
    assert left(folder) == [2, 3, 4, 9]
    ostro(capsys, "prune", folder, "--keep_last", "1", "--yes")
    assert left(folder) == [2, 4, 9]  # the best, the newest, and the other run's
    assert "0 of 3 checkpoints" in ostro(capsys, "prune", folder, "--keep_bytes", "0")


@pytest.mark.parametrize(("answer", "steps"), [("y", [2, 4, 9]), ("", [1, 2, 3, 4, 9])])
def test_prune_asks(folder, capsys, monkeypatch, answer, steps):
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    ostro(capsys, "prune", folder, "--keep_last", "1")
    assert left(folder) == steps


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ("ls nowhere", "nowhere - no complete checkpoint"),
        ("verify nowhere", "nowhere - no complete checkpoint"),
        ("prune nowhere", "nothing says what to keep"),
        ("prune nowhere --keep_last 0", "--keep_last = 0 - must be at least 1"),
        ("prune nowhere --keep_bytes much", "--keep_bytes = much - must be a number of bytes"),
        ("prune nowhere --keep_lst 3", "unknown option --keep_lst"),
        ("prun nowhere", "did you mean prune?"),
        ("diff nowhere", "the following arguments are required"),
        ("average nowhere", "--output"),
    ],
)
def test_mistakes(capsys, words, part):
    assert part in ostro(capsys, *words.split(), code=2)


def test_diff_says_what_differs_and_by_how_much(folder, capsys):
    lines = ostro(capsys, "diff", f"{folder}/me/step-1", f"{folder}/me/step-3").splitlines()
    assert lines[1:] == [
        "setting trainer.seed: 1 -> 3",
        f"value eval_loss: 1.0 -> {1 / 3}",
        "value step: 2 -> 4",
        "model weight: max |difference| 2, its norm 4.9, norms 2.44949 -> 7.34847",
        "optimizer weight.exp_avg: max |difference| 1, its norm 1.41, norms 0.707107 -> 2.12132",
    ]
    same = ostro(capsys, "diff", f"{folder}/me/step-1", f"{folder}/me/step-1")
    assert same.splitlines()[1:] == ["no difference"]


def test_diff_of_tensors_that_are_not_of_one_kind(tmp_path, capsys):
    write(
        str(tmp_path / "a"),
        state(1, up=torch.ones(2), gone=torch.ones(1)),
        step=1,
        is_temporary=False,
    )
    write(
        str(tmp_path / "b"),
        state(1, up=torch.ones(2, 1).half(), new=torch.ones(1)),
        step=1,
        is_temporary=False,
    )
    said = ostro(capsys, "diff", str(tmp_path / "a"), str(tmp_path / "b")).splitlines()[1:]
    assert said == [
        "model gone: only in the first",
        "model new: only in the second",
        "model up: float32 [2] -> float16 [2, 1]",
    ]


def test_average(folder, tmp_path, capsys):
    paths = [f"{folder}/me/step-{step}" for step in (1, 2, 4)]
    output = f"{folder}-average"
    said = ostro(capsys, "average", *paths, "--output", output)
    assert "mean weights of 3" in said and "not averaged, but of" in said and "optimizer" in said
    saved = load(f"{output}/step-4")
    saved.verify()
    weights = saved.tensors("model")
    assert torch.equal(weights["weight"], torch.full((3, 2), 7 / 3))
    assert weights["same"].dtype == torch.bfloat16 and (weights["same"] == 1).all()
    assert (saved.tensors("optimizer")["weight.exp_avg"] == 2).all()
    assert saved.values["step"] == 5 and saved.values["average_of"] == paths
    assert "is there already" in ostro(capsys, "average", *paths, "--output", output, code=2)
    inside = f"{folder}/me/average"
    assert "would go on from" in ostro(capsys, "average", *paths, "--output", inside, code=2)


def test_only_checkpoints_of_one_model_have_an_average(folder, tmp_path, capsys):
    write(str(tmp_path / "b"), state(1, new=torch.ones(1)), step=1, is_temporary=False)
    words = ["average", f"{folder}/me/step-1", str(tmp_path / "b"), "--output", str(tmp_path / "c")]
    assert "new is [1] here, absent in" in ostro(capsys, *words, code=2)
    assert not filesystem.is_folder(str(tmp_path / "c"))


def test_files_are_checkpoints_too(tmp_path, capsys):
    store = FileStore(str(tmp_path), "file", run_id="me")
    store.prepare()
    for step in (1, 2):
        store.save(state(step), step, "permanent", False, None)
    said = ostro(capsys, "ls", str(tmp_path))
    assert "step_1.pt" in said and "1.0000" in said and "2 checkpoints" in said
    assert ostro(capsys, "verify", str(tmp_path)).count("intact ") == 2
    paths = [str(tmp_path / f"step_{step}.pt") for step in (1, 2)]
    assert "trainer.seed: 1 -> 2" in ostro(capsys, "diff", *paths)
    ostro(capsys, "average", *paths, "--output", f"{tmp_path}-average")
    assert (load(f"{tmp_path}-average/step-2").tensors("model")["weight"] == 1.5).all()
    ostro(capsys, "prune", str(tmp_path), "--keep_last", "1", "--yes")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest_checkpoint.pt", "step_2.pt"]
    twos, threes = (torch.full((6,), number).numpy().tobytes() for number in (2.0, 3.0))
    data = (tmp_path / "step_2.pt").read_bytes()
    (tmp_path / "step_2.pt").write_bytes(data.replace(twos, threes))
    assert "step_2.pt" in ostro(capsys, "verify", str(tmp_path), code=2)


def test_the_average_of_a_run_is_evaluated_and_a_run_starts_from_it(tmp_path, capsys):
    path = write_config(tmp_path, trainer={"checkpointer": {"keep": [{"every": 2}]}})
    assert run_command(["train", "--config_path", str(path)]) == 0
    paths = [str(tmp_path / f"checkpoints/tiny/step-{step}") for step in (4, 5)]
    average = str(tmp_path / "average")
    ostro(capsys, "average", *paths, "--output", average)
    assert run_command(["eval", "--checkpoint", average]) == 0
    assert "eval/loss" in capsys.readouterr().out
    more = ["--trainer.id", "next", "--trainer.initialize_from", average]
    assert (
        run_command(["train", "--config_path", str(path), *more, "--trainer.num_train_steps", "8"])
        == 0
    )
    assert find_latest(str(tmp_path / "checkpoints/next")).values["step"] == 8
