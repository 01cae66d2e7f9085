"""What the pages show works: examples run, and every block of settings is accepted."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import parse_args

from ostro.cli.main import run_command
from ostro.config import load
from ostro.lm_config import TrainLmConfig
from ostro.tracker import RunInfo, TrackerConfig

DOCS = Path(__file__).parents[1] / "docs"
EXAMPLES = DOCS / "examples"


@pytest.fixture
def examples_on_path(monkeypatch):
    """The examples can be imported, and what they register is forgotten afterwards."""
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(
        TrackerConfig, "_choice_registry", dict(TrackerConfig.get_known_choices()), raising=True
    )
    yield
    sys.modules.pop("csv_tracker", None)


def test_a_tracker_of_your_own_is_named_in_a_configuration(tmp_path, examples_on_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "imports: [csv_tracker]\n"
        "data: {source: stdlib}\n"
        "trainer:\n"
        "  tracker:\n"
        "    - type: console\n"
        "    - {type: csv, filename: figures.csv}\n"
    )
    config = load(TrainLmConfig, [str(path)]).config
    tracker = config.trainer.tracker[1].build(RunInfo("me", str(tmp_path)))
    tracker.log({"train/loss": 3.5, "optim/learning_rate": 0.1}, step=0)
    tracker.log({"train/loss": float("nan")}, step=1)
    tracker.finish()
    with open(tmp_path / "me" / "figures.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["0", "train/loss", "3.5"],
        ["0", "optim/learning_rate", "0.1"],
        ["1", "train/loss", "nan"],
    ]


def test_registered_trackers_are_as_before():
    assert "csv" not in TrackerConfig.get_known_choices()


def own_program(*words):
    command = [sys.executable, str(EXAMPLES / "own_program.py"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_a_program_of_your_own_reads_its_settings():
    done = own_program("--greeting", "hi", "--times", "2", "--pause.length", "1m30s")
    assert (done.stdout, done.returncode) == ("hi 0:01:30\nhi 0:01:30\n", 0), done.stderr
    wrong = own_program("--greting", "hi")
    assert wrong.returncode == 2
    assert "did you mean greeting?" in wrong.stderr


def blocks() -> list:
    """Every YAML block of the pages that is a (part of a) run's configuration."""
    found = []
    for page in sorted(DOCS.glob("*.md")):
        for index, text in enumerate(re.findall(r"```yaml\n(.*?)```", page.read_text(), re.S)):
            if "--8<--" not in text and "!include" not in text:
                found.append(pytest.param(text, id=f"{page.stem}-{index}"))
    return found


@pytest.mark.parametrize("text", blocks())
def test_settings_shown_in_the_pages_exist(tmp_path, text, examples_on_path):
    path = tmp_path / "block.yaml"
    path.write_text(text if "data:" in text else f"data: {{source: stdlib}}\n{text}")
    load(TrainLmConfig, [str(path)])


def test_there_are_blocks_to_test():
    assert len(blocks()) > 8


def test_field_tables_name_classes_that_exist():
    names = set()
    for page in DOCS.glob("*.md"):
        names |= set(re.findall(r"<!-- fields: (\S+) -->", page.read_text()))
    assert len(names) > 10
    for name in names:
        module, _, attribute = name.rpartition(".")
        assert hasattr(sys.modules[module], attribute), name


def test_the_slurm_script_is_what_its_command_prints(capsys, monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    page = (DOCS / "cluster.md").read_text()
    command = re.search(r"```\nostro (launch slurm [^`]*)```", page)[1]
    assert run_command(command.replace("\\\n", " ").split()) == 0
    assert capsys.readouterr().out.strip() == (EXAMPLES / "slurm.sh").read_text().strip()


def test_the_kubernetes_manifest_starts_a_run_whose_pods_find_each_other():
    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    assert (service["kind"], job["kind"], service["spec"]["clusterIP"]) == (
        "Service",
        "Job",
        "None",
    )
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    assert pod["subdomain"] == service["metadata"]["name"]
    assert job["spec"]["completionMode"] == "Indexed"
    volumes = {volume["name"] for volume in pod["volumes"]}
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    words = container["args"][0].replace("$JOB_COMPLETION_INDEX", "3").split()
    assert words[:2] == ["exec", "torchrun"]
    launcher = parse_args(words[2:])
    assert int(launcher.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert int(launcher.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert launcher.master_addr == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert [launcher.training_script, *launcher.training_script_args[:2]] == [
        "ostro", "train", "--config_path"
    ]  # fmt: skip
