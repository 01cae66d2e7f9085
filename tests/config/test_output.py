"""What leaves the configuration again: YAML, trees, help, schema, and a user's main function."""

import json
import math
import subprocess
import sys
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal

import pytest
import yaml
from config_sample import (
    ALIASES,
    ConsoleConfig,
    Cosine,
    Gpt2,
    InverseRoot,
    Keep,
    Llama,
    ModelConfig,
    Optimizer,
    RunConfig,
    ScheduleConfig,
    TensorboardConfig,
    TrackerConfig,
    Trainer,
    WandbConfig,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import ostro.config
from ostro.config import dump_yaml, encode, format_tree, help_text, json_schema, load
from ostro.core.redaction import redacted
from ostro.core.units import Precision


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@dataclass(frozen=True)
class Everything:
    text: str = ""
    maybe: str | None = None
    number: int | float = 0
    ratio: float = 0.0
    flag: bool | str | None = None
    count: int | None = None
    duration: timedelta = timedelta(0)
    precision: Precision = field(default_factory=Precision)
    names: list[str] = field(default_factory=list)
    several: list[str] | str | None = None
    pair: tuple[int, str] = (0, "")
    nested: dict[str, dict[str, str]] = field(default_factory=dict)
    sizes: dict[str, int | None] = field(default_factory=dict)
    kind: Literal["a", "null", "1e-4"] = "a"
    keep: list[Keep] = field(default_factory=list)
    stages: int | list[Keep] = 1
    schedule: ScheduleConfig = field(default_factory=Cosine)
    tracker: TrackerConfig | list[TrackerConfig] | None = None


_TEXT = st.text(max_size=12) | st.sampled_from(
    ["01234567", "null", "yes", "", "6E-4", "1e-4", "a\nb\n", " x ", "~", "20m", "1:30", "<<", "=",
     "[a]", "{a: b}", "!include x", "# no", "a: b", "- a", "é\u2028\x85\ufeff\U0001f600", ".5"]
)  # fmt: skip
_KEY = _TEXT.filter(lambda name: redacted("x", name) == "x")  # a credential is not written out
_FLOAT = st.floats(allow_nan=False, allow_infinity=False)
_KEEP = st.builds(Keep, st.integers(), st.none() | st.integers())
_TRACKER = (
    st.builds(
        WandbConfig, _TEXT, st.none(), _TEXT, st.lists(_TEXT), st.booleans() | st.just("allow")
    )
    | st.builds(TensorboardConfig, _TEXT)
    | st.just(ConsoleConfig())
)
_EVERYTHING = st.builds(
    Everything,
    text=_TEXT,
    maybe=st.none() | _TEXT,
    number=st.integers() | _FLOAT,
    ratio=_FLOAT,
    flag=st.none() | st.booleans() | _TEXT,
    count=st.none() | st.integers(),
    duration=st.timedeltas(timedelta(0), timedelta(days=3650)),
    precision=st.sampled_from([Precision(), Precision("float32", "bfloat16", "bfloat16")]),
    names=st.lists(_TEXT, max_size=3),
    several=st.none() | _TEXT | st.lists(_TEXT, max_size=3),
    pair=st.tuples(st.integers(), _TEXT),
    nested=st.dictionaries(_KEY, st.dictionaries(_KEY, _TEXT, max_size=2), max_size=2),
    sizes=st.dictionaries(_TEXT, st.none() | st.integers(), max_size=2),
    kind=st.sampled_from(["a", "null", "1e-4"]),
    keep=st.lists(_KEEP, max_size=2),
    stages=st.integers() | st.lists(_KEEP, max_size=2),
    schedule=st.builds(Cosine, _FLOAT) | st.builds(InverseRoot, _FLOAT),
    tracker=st.none() | _TRACKER | st.lists(_TRACKER, max_size=2),
)


@settings(max_examples=150, deadline=None)
@given(_EVERYTHING)
def test_dump_loads_back_to_an_equal_config(config: Everything):
    Path("dump.yaml").write_text(dump_yaml(config), encoding="utf-8", newline="")
    loaded = load(Everything, ["dump.yaml"]).config
    assert loaded == config
    assert type(loaded.number) is type(config.number)
    assert math.copysign(1, loaded.ratio) == math.copysign(1, config.ratio)


def test_encode_is_plain_and_states_types():
    config = RunConfig(
        model=Llama(),
        trainer=Trainer(tracker=[WandbConfig(), TensorboardConfig("x")], keep=[Keep(5)]),
    )
    plain = encode(config)
    assert plain["model"] == {"type": "llama", "hidden_dim": 4096, "num_kv_heads": 8}
    assert plain["trainer"]["save_interval"] == "15m"
    assert plain["trainer"]["precision"] == "f32"
    assert plain["trainer"]["tracker"][1] == {"type": "tensorboard", "logdir": "x"}
    assert json.loads(json.dumps(plain)) == plain
    assert yaml.safe_load(dump_yaml(config)) == plain


def test_registries_do_not_share_their_names():
    assert set(TrackerConfig.get_known_choices()) == {"wandb", "tensorboard", "console"}
    assert set(ModelConfig.get_known_choices()) == {"gpt2", "llama"}


def test_the_tree_shows_every_leaf_with_its_origin():
    Path("run.yaml").write_text("trainer:\n  seed: 3\n  tracker: [tensorboard, {type: wandb}]\n")
    loaded = load(RunConfig, ["run.yaml"], ["--model.num_heads", "6"])
    text = format_tree(loaded)
    assert yaml.safe_load(text) == encode(loaded.config)
    rows = [line.partition(" # ") for line in text.splitlines()]
    origins = {row[0].strip(): row[2] for row in rows if row[2]}
    assert origins["seed: 3"] == "run.yaml:2"
    assert origins["num_heads: 6"] == "--model.num_heads"
    assert origins["- type: tensorboard"] == "run.yaml:3"
    assert origins["tags: []"] == "default"
    assert len({line.index(" # ") for line in text.splitlines() if " # " in line}) == 1
    assert len([row for row in rows if row[2]]) == len(loaded.origins)


def test_field_docs_include_inherited_ones():
    @dataclass(frozen=True)
    class Child(Optimizer):
        extra: int = 1
        """More."""

    docs = ostro.config.field_docs(Child)
    assert docs["extra"] == "More." and docs["learning_rate"] == "Peak learning rate."


def test_help_lists_flags_types_defaults_and_docs():
    text = help_text(RunConfig)
    lines = [line.strip() for line in text.splitlines()]
    assert "--model.type  type gpt2|llama  (default gpt2)" in lines
    assert "--model.num_heads  int  (default 12)" in lines
    assert "--trainer.save_interval  duration  (default 15m)" in lines
    assert "--trainer.device  auto | cuda | cpu  (default auto)" in lines
    assert "--trainer.tracker.project  text | null  (default null)" in lines
    assert "--optimizer.cycles  int | list of int | null  (default null)" in lines
    assert lines[lines.index("--trainer.seed  int  (default 0)") + 1] == "Random seed."
    assert not any("num_kv_heads" in line for line in lines)


def test_schema_describes_every_field():
    schema = json_schema(RunConfig)
    assert schema["$schema"].endswith("2020-12/schema")
    definitions = schema["$defs"]
    assert schema["$ref"] == "#/$defs/RunConfig"
    trainer = definitions["Trainer"]
    assert trainer["additionalProperties"] is False
    assert set(trainer["properties"]) == set(Trainer.__dataclass_fields__)
    assert trainer["properties"]["seed"]["description"] == "Random seed."
    assert trainer["properties"]["seed"]["default"] == 0
    assert trainer["properties"]["device"]["enum"] == ["auto", "cuda", "cpu"]
    assert definitions["Keep"]["required"] == ["every"]
    model, shorthand = definitions["RunConfig"]["properties"]["model"]["anyOf"]
    assert model["properties"]["type"]["enum"] == ["gpt2", "llama"]
    assert shorthand == {"type": "string"}
    rule = model["allOf"][1]
    assert rule["if"]["properties"]["type"] == {"const": "llama"}
    llama = definitions[rule["then"]["$ref"].removeprefix("#/$defs/")]
    assert set(llama["properties"]) == {"type", "hidden_dim", "num_kv_heads"}
    assert json.loads(json.dumps(schema)) == schema


def test_schema_accepts_what_loads():
    jsonschema = pytest.importorskip("jsonschema")
    schema = json_schema(RunConfig)
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    validator.validate(encode(RunConfig()))
    validator.validate({"optimizer": {"learning_rate": "1e-4", "schedule": "cosine"}})
    assert not validator.is_valid({"model": {"type": "llama", "num_heads": 3}})
    assert not validator.is_valid({"trainer": {"sed": 1}})


_SCRIPT = """
import sys
from dataclasses import dataclass, field
sys.path.insert(0, {tests!r})
from config_sample import Gpt2, ModelConfig as LmConfig, Optimizer, Trainer
import ostro.config
from ostro.core.errors import DataError


@dataclass
class TrainConfig:
    trainer: Trainer = field(default_factory=Trainer)
    model: LmConfig = field(default_factory=Gpt2)
    optimizer: Optimizer = field(default_factory=Optimizer)


def train(config: TrainConfig):
    if config.trainer.seed == 13:
        raise DataError("no data")
    print(config.model, config.trainer.seed)


if __name__ == "__main__":
    ostro.config.main(train)()
"""


def run_script(folder: Path, *words: str, cwd: Path | None = None) -> subprocess.CompletedProcess:
    script = folder / "scripts" / "train.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(_SCRIPT.format(tests=str(Path(__file__).parent)))
    (folder / "scripts" / "small.yaml").write_text("model: {hidden_dim: 48}\n")
    command = [sys.executable, str(script), *words]
    return subprocess.run(command, cwd=cwd or folder, capture_output=True, text=True, timeout=60)


def test_main_runs_a_users_script(folder: Path):
    done = run_script(folder, "--config_path", "small", "--trainer.seed", "4")
    assert done.returncode == 0, done.stderr
    assert "Gpt2(hidden_dim=48, num_heads=12" in done.stdout and done.stdout.strip().endswith(" 4")
    done = run_script(folder, "--config_path=small.yaml", "--trainer.sed", "4")
    assert done.returncode == 2
    message = "trainer.sed = 4 (--trainer.sed) - is not a setting - did you mean seed?"
    assert done.stderr.strip() == message


@dataclass
class Mine:
    trainer: Trainer = field(default_factory=Trainer)
    model: ModelConfig = field(default_factory=Gpt2)


@ostro.config.main
def decorated(config: Mine) -> Mine:
    if config.trainer.seed == 13:
        raise ostro.core.errors.DataError("no data")
    return config


def call(monkeypatch: pytest.MonkeyPatch, *words: str):
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    return decorated()


def test_main_as_a_decorator(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    Path("a.yaml").write_text("trainer: {seed: 1, id: a}")
    Path("b.yaml").write_text("trainer: {seed: 2}")
    assert call(monkeypatch, "--configs", "a.yaml", "b.yaml").trainer == Trainer(seed=2, id="a")
    assert call(monkeypatch, "--config", "a", "--trainer.seed=7").trainer.seed == 7
    assert decorated(Mine()) == Mine()
    for words, message in [
        (["--trainer.seed=13"], "no data\n"),
        (["--config_path"], "--config_path needs the name of a file"),
        (["--config_path", "c.yaml"], "c.yaml (command line) - no such file"),
    ]:
        with pytest.raises(SystemExit) as stopped:
            call(monkeypatch, *words)
        assert stopped.value.code == 2
        errors = capsys.readouterr().err
        assert errors.startswith(message) and "Traceback" not in errors
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "--trainer.seed=13", "--debug")
    assert stopped.value.code == 2 and "Traceback" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        call(monkeypatch, "--help")
    assert stopped.value.code == 0 and "--trainer.seed" in capsys.readouterr().out


def test_main_prints_notices_of_its_aliases(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def train(config: RunConfig) -> float:
        return config.optimizer.learning_rate

    monkeypatch.setattr(sys, "argv", ["train.py", "--trainer.learning_rate", "3e-4"])
    assert ostro.config.main(aliases=ALIASES)(train)() == 3e-4
    assert "is read as optimizer.learning_rate" in capsys.readouterr().err


def test_importing_the_package_is_cheap():
    code = "import sys, ostro.config; print({'torch', 'numpy', 'fsspec'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()"
