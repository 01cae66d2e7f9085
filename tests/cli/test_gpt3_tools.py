"""`ostro benchmark`, `evaluate.py` and `infer.py` as typed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from benchmark_model import write_model, write_tasks

from ostro.checkpoint import State, find_latest
from ostro.checkpoint.folders import FileStore
from ostro.cli.gpt3_tools import evaluate, infer, results_folder
from ostro.cli.main import run_command
from ostro.runtime import entry_point
from ostro.runtime.entry_point import run_script
from ostro.train_lm import load_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint in `experiments/bench/checkpoints`, a model file and small tasks."""
    folder = tmp_path_factory.mktemp("tools")
    write_model(folder)
    (folder / "tasks").mkdir()
    write_tasks(folder / "tasks")
    (folder / "125M.yaml").write_text("n_layers: 12\n")
    return folder


def script(name: str, folder: Path, *words: str, checkpoint: str = "experiments/bench"):
    """Run a script in `folder`, without the Hugging Face hub."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf_home")}
    command = [sys.executable, SOURCE / f"{name}.py", "--model_checkpoint", checkpoint]
    return subprocess.run(
        [*command, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.fixture
def called(folder, monkeypatch, capsys):
    """Call what a script calls: its exit code, output and errors."""
    monkeypatch.chdir(folder)

    def call(function, checkpoint, *words):
        monkeypatch.setattr(sys, "argv", ["script", "--model_checkpoint", checkpoint, *words])
        monkeypatch.setattr(entry_point, "leave_after", lambda run: sys.exit(run()))
        with pytest.raises(SystemExit) as stop:
            run_script(function)
        return stop.value.code, *capsys.readouterr()

    return call


@pytest.mark.cli
def test_evaluate_keeps_scores_with_the_experiment(folder):
    words = ["--config", "125M.yaml", "--task_folder", "tasks", "--limit", "4", "--benchmark"]
    done = script("evaluate", folder, *words, "local_piqa", "local_lambada")
    assert done.returncode == 0, done.stderr
    assert "acc_norm" in done.stdout and "perplexity" in done.stdout
    (path,) = (folder / "experiments" / "bench" / "results").glob("*.json")
    found = json.loads(path.read_text())
    assert str(path.relative_to(folder)) in done.stdout
    assert (found["step"], found["limit"]) == (0, 4)
    assert found["checkpoint"] == "experiments/bench/checkpoints/step-0"
    assert {"date", "lm_eval"} <= found.keys()
    assert set(found["benchmarks"]) == {"local_piqa", "local_lambada"}
    scores = found["benchmarks"]["local_piqa"]["results"]["local_piqa"]
    assert scores["acc,none"] in (0, 0.25, 0.5, 0.75, 1)


@pytest.mark.cli
def test_a_data_set_out_of_reach_is_one_error(folder):
    done = script("evaluate", folder, "--config", "125M.yaml", "--benchmark", "piqa")
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("ostro: error: ")]
    assert "--benchmark piqa" in line and "HF_HOME" in line and "--task_folder" in line


def test_mistakes_of_evaluate(folder, capsys, monkeypatch):
    for words, expected in [
        (["--limit", "0", "--num_fewshot", "-1", "--benchmark", "piqa"], "--num_fewshot = -1"),
        (["--task_folder", "nowhere", "--benchmark", "piqa"], "nowhere"),
        (["--device", "abacus", "--benchmark", "piqa"], "abacus"),
        (["--task_folder", str(folder / "tasks"), "--benchmark", "piqqa"], "did you mean piqa?"),
        (["--bench", "piqa"], "--benchmark"),
        (["--benchmark", "piqa", "--limits", "3"], "--limits"),
    ]:
        given = ["benchmark", "--checkpoint", str(folder / "experiments"), *words]
        assert run_command(given) == 2
        err = capsys.readouterr().err
        assert err.startswith("ostro: error: ") and expected in err


def test_missing_checkpoint_and_config(folder, called):
    words = ["--config", "125M.yaml", "--benchmark", "piqa"]
    code, _, err = called(evaluate, "nowhere", *words)
    assert code == 2 and "--model_checkpoint nowhere" in err
    for function, more in ((evaluate, ["--benchmark", "piqa"]), (infer, ["--prompt", "the"])):
        code, _, err = called(function, "experiments", "--config", "13B.yaml", *more)
        assert code == 2 and err.startswith("ostro: error: --config = 13B.yaml")


def test_a_typo_in_a_benchmark(folder, called):
    words = ["--config", "125M.yaml", "--task_folder", str(folder / "tasks")]
    code, _, err = called(evaluate, "experiments", *words, "--benchmark", "piqa", "trivaqa")
    assert code == 2 and "did you mean triviaqa?" in err
    assert not (folder / "experiments" / "125M").exists()


@pytest.mark.cli
def test_infer_writes(folder, called):
    words = ["--config", "125M.yaml", "--prompt", "the quick", "--max_length", "20"]
    more = ["--temperature", "0.7", "--top_p", "0.8", "--top_k", "40", "--device", "cpu"]
    done = script("infer", folder, *words, *more)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the quick") and len(done.stdout) > len("the quick\n")
    assert called(infer, "experiments", *words, *more, "--seed", "0")[1] == done.stdout
    assert called(infer, "experiments", *words, *more, "--seed", "1")[1] != done.stdout


def test_max_length_counts_the_prompt(folder, called):
    words = ["--config", "125M.yaml", "--temperature", "0", "--prompt", "the quick"]
    saved = find_latest(str(folder / "experiments"), weights=True)
    used = len(load_tokenizer(saved).encode_prompt("the quick"))
    lengths = [
        len(called(infer, "experiments", *words, "--max_length", str(used + more))[1].encode())
        for more in (1, 2, 30)
    ]
    assert lengths == sorted(set(lengths))
    code, _, err = called(infer, "experiments", *words, "--max_length", str(used))
    assert code == 2 and f"--max_length = {used} - " in err
    code, _, err = called(infer, "experiments", *words, "--temprature", "1")
    assert code == 2 and "temperature" in err


@pytest.mark.parametrize("single_file", [False, True])
def test_benchmark_prints_and_keeps(folder, tmp_path, capsys, monkeypatch, single_file):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "data_sets"))
    checkpoint = folder / "experiments"
    if single_file:  # as `src/train.py` leaves it
        saved = find_latest(str(checkpoint), weights=True)
        store = FileStore(str(tmp_path), "file", "me")
        store.prepare()
        state = State({"model": saved.tensors("model")}, saved.values, saved.texts)
        store.save(state, 0, "permanent", False, None)
        checkpoint = tmp_path / "latest_checkpoint.pt"
    words = ["benchmark", "--checkpoint", str(checkpoint), "--device", "cpu"]
    words += ["--task_folder", str(folder / "tasks"), "--benchmark", "local_text"]
    assert run_command(words) == 0
    assert "bits_per_byte" in capsys.readouterr().out
    assert run_command([*words, "--output", str(tmp_path / "new" / "scores")]) == 0
    (path,) = (tmp_path / "new" / "scores").iterdir()
    assert str(path) in capsys.readouterr().out


def test_where_results_go(folder):
    saved = find_latest(str(folder / "experiments"), weights=True)
    for path, expected in [
        ("experiments/a/checkpoints/step-5", "experiments/a/results"),
        ("/x/experiments/y/experiments/a/step-5", "/x/experiments/y/experiments/a/results"),
        ("experiments/step-5", "experiments/125M/results"),
        ("/runs/step-5", "experiments/125M/results"),
        ("gs://bucket/experiments/a/step-5", "experiments/a/results"),
    ]:
        saved.path = path
        assert results_folder(saved, "configs/125M.yaml") == Path(expected)


@pytest.mark.parametrize("name", ["evaluate", "infer"])
def test_the_scripts_do_not_hide_the_library_evaluate(name, tmp_path):
    """The folder is Python's first place; behind the script's first lines it is none."""
    package = tmp_path / "ostro" / "cli"
    package.mkdir(parents=True)
    (tmp_path / "ostro" / "__init__.py").touch()
    stub = f"def {name}(*_):\n    import importlib.util as u; print(u.find_spec('evaluate'))\n"
    (package / "gpt3_tools.py").write_text(stub)
    (package.parent / "runtime").mkdir()
    script = "def run_script(command):\n    command([], None)\n"
    (package.parent / "runtime" / "entry_point.py").write_text(script)
    for script in ("evaluate.py", "infer.py"):
        shutil.copy(SOURCE / script, tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, tmp_path / f"{name}.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert "site-packages" in done.stdout and str(tmp_path) not in done.stdout


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(["benchmark", "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "superglue" in out and "--trainer" not in out
