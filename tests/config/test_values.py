"""Flags, layers, conversion by type, other spellings, imports."""

import sys
from dataclasses import dataclass, field, replace
from datetime import timedelta
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from config_sample import (
    ALIASES,
    ConsoleConfig,
    Cosine,
    Gpt2,
    InverseRoot,
    Keep,
    Llama,
    ModelConfig,
    RunConfig,
    TensorboardConfig,
    TrackerConfig,
    WandbConfig,
)

from ostro.config import Alias, Loaded, check, convert, load
from ostro.core.errors import ConfigError, Problem
from ostro.core.units import Precision


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def resolve(text: str = "", *flags: str, **kwargs: Any) -> Loaded[RunConfig]:
    Path("run.yaml").write_text(text)
    return load(RunConfig, ["run.yaml"], flags, aliases=ALIASES, **kwargs)


def problems(text: str = "", *flags: str) -> list[Problem]:
    with pytest.raises(ConfigError) as caught:
        resolve(text, *flags)
    return caught.value.problems


# Scalars


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [
        ("optimizer.learning_rate", "6E-4", 6e-4),
        ("optimizer.learning_rate", "1e-4", 1e-4),
        ("optimizer.learning_rate", ".1", 0.1),
        ("optimizer.learning_rate", "1", 1.0),
        ("optimizer.learning_rate", "1_000.5", 1000.5),
        ("trainer.seed", "400_000", 400_000),
        ("trainer.seed", "-5", -5),
        ("trainer.seed", "'7'", 7),
        ("trainer.id", "01234567", "01234567"),
        ("trainer.id", "true", "true"),
        ("trainer.id", "1e-4", "1e-4"),
        ("trainer.id", "null", None),
        ("trainer.id", "~", None),
        ("trainer.id", "'null'", "null"),
        ("trainer.id", "", ""),
        ("trainer.id", "Q: who? #1", "Q: who? #1"),
        ("trainer.id", "[draft] {x}", "[draft] {x}"),
        ("trainer.crash_on_nan", "False", False),
        ("trainer.crash_on_nan", "yes", True),
        ("trainer.save_interval", "1h30m", timedelta(minutes=90)),
        ("trainer.save_interval", "1:30", timedelta(seconds=90)),
        ("trainer.precision", "p=f32,c=bfloat16", Precision("float32", "bfloat16", "bfloat16")),
        ("optimizer.warmup", "1", 1),
        ("optimizer.warmup", "1.0", 1.0),
        ("optimizer.cycles", "3", 3),
        ("optimizer.cycles", "[300, 700]", [300, 700]),
        ("trainer.tracker.resume", "True", True),
        ("trainer.tracker.resume", "allow", "allow"),
        ("trainer.tracker.tags", "[a, 01]", ["a", "01"]),
        ("trainer.tracker.tags", "one", ["one"]),
        ("trainer.axes", "{mlp: model, embed: [a, b]}", {"mlp": "model", "embed": ["a", "b"]}),
        ("trainer.device", "cpu", "cpu"),
    ],
)
def test_values_are_read_by_the_type_of_the_field(flag: str, value: str, expected: Any):
    for flags in ([f"--{flag}", value], [f"--{flag}={value}"]):
        loaded = resolve("", *flags)
        found: Any = loaded.config
        for part in flag.split("."):
            found = getattr(found, part)
        assert found == expected and type(found) is type(expected)


@pytest.mark.parametrize(
    ("flag", "value", "rule", "advice"),
    [
        ("trainer.seed", "1.5", "must be a whole number", ""),
        ("trainer.seed", "1e3", "must be a whole number", "write 1000"),
        ("trainer.seed", "2.0", "must be a whole number", "write 2"),
        ("trainer.seed", "null", "must not be null", ""),
        ("trainer.seed", "[1]", "must be a whole number", ""),
        ("trainer.log_dir", "null", "must not be null", ""),
        ("trainer.crash_on_nan", "1", "must be true or false", ""),
        ("optimizer.learning_rate", "inf", "must be a finite number", ""),
        ("optimizer.learning_rate", "1e999", "must be a finite number", ""),
        ("optimizer.learning_rate", ".nan", "must be a finite number", ""),
        ("optimizer.warmup", "soon", "must be a number", ""),
        ("trainer.device", "cud", "must be one of auto, cuda, cpu", "did you mean cuda?"),
        ("trainer.keep", "null", "must not be null", "write [] for none"),
        ("trainer.tracker.tags", "[a, b", "is not a complete list: write [a, b]", ""),
        ("trainer.tracker.tags", "{a: b}", "must be a list", ""),
        ("model", "[gpt2]", "must be a mapping of settings", ""),
        ("trainer", "7", "must be a mapping of settings", ""),
    ],
)
def test_bad_values_name_the_rule(flag: str, value: str, rule: str, advice: str):
    (problem,) = problems("", f"--{flag}", value)
    assert (problem.setting, problem.rule, problem.advice) == (flag, rule, advice)
    assert (problem.value, problem.origin) == (value, f"--{flag}")


def test_a_mistake_below_a_flag_is_still_one():
    (problem,) = problems("trainer: 7\n", "--trainer.seed=1")
    assert (problem.setting, problem.value, problem.origin) == ("trainer", "7", "run.yaml:1")


def test_a_missing_file_does_not_ask_for_what_it_may_hold():
    @dataclass
    class Mine:
        keep: Keep

    with pytest.raises(ConfigError) as caught:
        load(Mine, ["no.yaml"], ["--keep.until", "x"])
    assert [problem.setting for problem in caught.value.problems] == ["no.yaml", "keep.until"]


def test_yaml_text_is_not_guessed_either():
    text = "trainer: {id: 01234567, log_dir: yes}\noptimizer: {learning_rate: 6E-4}\n"
    config = resolve(text).config
    assert (config.trainer.id, config.trainer.log_dir) == ("01234567", "yes")
    assert config.optimizer.learning_rate == 6e-4


# Flags


def test_a_flag_alone_is_true_and_a_negative_number_is_a_value():
    loaded = resolve(
        "trainer: {crash_on_nan: false}", "--trainer.crash_on_nan", "--trainer.seed=-3"
    )
    assert loaded.config.trainer.crash_on_nan is True
    assert loaded.config.trainer.seed == -3


def test_a_flag_can_include_a_file():
    Path("llama.yaml").write_text("type: llama\nnum_kv_heads: 2\n")
    loaded = resolve("", "--model", "!include llama.yaml", "--model.hidden_dim", "64")
    assert loaded.config.model == Llama(64, 2)
    assert loaded.origins["model.num_kv_heads"] == "llama.yaml:2"


def test_malformed_flags_show_the_likely_form():
    first, second, third, fourth = problems(
        "",
        "--trainer.wandb,group",
        "x",
        "trainer.seed=4",
        "trainer.sed",
        "5",
        "--optimizer/warmup=1",
    )
    assert (first.setting, first.value) == ("--trainer.wandb,group", "x")
    assert first.advice == "did you mean --trainer.wandb.group?"
    assert second.setting == "trainer.seed=4" and "--trainer.seed" in second.advice
    assert third.setting == "trainer.sed" and third.advice == "did you mean --trainer.seed?"
    assert fourth.advice == "did you mean --optimizer.warmup?"


def test_later_flags_win_and_shorthand_mixes_with_fields():
    loaded = resolve(
        "", "--trainer.seed=1", "--trainer.seed=2", "--model.num_kv_heads=4", "--model=llama"
    )
    assert loaded.config.trainer.seed == 2
    assert loaded.config.model == Llama(num_kv_heads=4)


# Layers


def test_default_file_flag_order_and_origins():
    loaded = resolve("trainer:\n  seed: 1\n  id: a\n  axes: {x: y}\n", "--trainer.seed", "2")
    assert (loaded.config.trainer.seed, loaded.config.trainer.id) == (2, "a")
    assert loaded.origins["trainer.seed"] == "--trainer.seed"
    assert loaded.origins["trainer.id"] == "run.yaml:3"
    assert loaded.origins["trainer.axes.x"] == "run.yaml:4"
    assert loaded.origins["trainer.log_dir"] == "default"
    assert loaded.origins["trainer.tracker.type"] == "default"
    assert loaded.origins["trainer.keep.0.every"] == "default"
    assert "trainer" not in loaded.origins
    derived = loaded.derive(trainer=replace(loaded.config.trainer, keep=[Keep(5)]))
    assert derived.config.trainer.keep == [Keep(5)] != loaded.config.trainer.keep
    assert derived.origins["trainer.keep.0.every"] == "derived"
    names = {name for name in derived.origins if not name.startswith("trainer.")}
    assert names and all(derived.origins[name] == loaded.origins[name] for name in names)


def test_mappings_merge_and_lists_replace():
    text = "trainer: {axes: {a: x, b: y}, keep: [{every: 1}, {every: 2}]}\n"
    loaded = resolve(text, "--trainer.axes.b=z", "--trainer.keep", "[{every: 7}]")
    assert loaded.config.trainer.axes == {"a": "x", "b": "z"}
    assert loaded.config.trainer.keep == [Keep(7)]
    assert loaded.origins["trainer.axes.a"] == "run.yaml:1"


def test_a_position_in_a_list_can_be_set():
    text = "trainer: {keep: [{every: 1}, {every: 2}]}\n"
    loaded = resolve(text, "--trainer.keep.1.until=9", "--trainer.keep.2.every=3")
    assert loaded.config.trainer.keep == [Keep(1), Keep(2, 9), Keep(3)]


def test_a_changed_type_drops_the_fields_below_and_says_so():
    text = "model:\n  hidden_dim: 64\n  num_heads: 4\n"
    loaded = resolve(text, "--model.type", "llama")
    assert loaded.config.model == Llama()
    assert any("hidden_dim, num_heads (run.yaml:2)" in notice for notice in loaded.notices)
    assert loaded.origins["model.hidden_dim"] == "default"
    for flags in (["--model.type", "gpt2"], ["--model", "gpt2"], ["--model={type: gpt2}"]):
        loaded = resolve(text, *flags)
        assert loaded.config.model == Gpt2(64, 4) and not loaded.notices


def test_a_bare_word_stands_for_a_type():
    loaded = resolve("optimizer: {schedule: inv_sqrt}", "--optimizer.schedule.timescale", "10")
    assert loaded.config.optimizer.schedule == InverseRoot(10.0)
    assert loaded.origins["optimizer.schedule.type"] == "run.yaml:1"
    assert resolve("optimizer: {schedule: {floor: 0}}").config.optimizer.schedule == Cosine(0.0)


def test_a_partial_mapping_starts_from_the_default_instance():
    @dataclass
    class Mine:
        model: ModelConfig = field(default_factory=lambda: Gpt2(hidden_dim=32, num_heads=2))
        axes: dict[str, int] = field(default_factory=lambda: {"a": 1})

    assert load(Mine, [], ["--model.num_layers", "3"]).config.model == Gpt2(32, 2, 3)
    assert load(Mine, [], ["--model.type", "gpt2"]).config.model == Gpt2(32, 2)
    assert load(Mine, [], ["--model.type", "llama"]).config.model == Llama()
    assert load(Mine, [], ["--axes.b", "2"]).config.axes == {"a": 1, "b": 2}


# Names


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("model.num_head", "did you mean num_heads?"),
        ("model.num_kv_heads", "it belongs to type llama"),
        ("trainer.warmup", "did you mean optimizer.warmup?"),
        ("trainer.wanb.project", "did you mean wandb?"),
        ("optimiser.warmup", "did you mean optimizer?"),
        ("trainer.crash-on-nan", "did you mean crash_on_nan?"),
    ],
)
def test_unknown_names_get_the_nearest_known_one(flag: str, advice: str):
    (problem,) = problems("", f"--{flag}=1")
    assert flag.startswith(problem.setting)
    assert problem.advice == advice


def test_unknown_types_list_the_known_ones():
    (problem,) = problems("trainer:\n  tracker:\n    - {type: wandb}\n    - {type: tensorbord}\n")
    assert problem.setting == "trainer.tracker.1.type" and problem.origin == "run.yaml:4"
    assert "known: console, tensorboard, wandb" in problem.rule
    assert problem.advice == "did you mean tensorboard?"


def test_required_fields_and_types_are_listed():
    @dataclass(frozen=True)
    class Inner:
        size: int
        name: str

    class Kind(ModelConfig):
        default_type = None

    Kind._choice_registry = {"one": Gpt2}

    @dataclass(frozen=True)
    class Mine:
        inner: Inner
        kind: Kind
        late: Inner = field(default_factory=Inner)  # type: ignore[arg-type]

    with pytest.raises(ConfigError) as caught:
        load(Mine, [], ["--inner.size=1", "--kind.hidden_dim=4"])
    assert {(p.setting, p.rule.split(" (")[0]) for p in caught.value.problems} == {
        ("inner.name", "is required"),
        ("kind.type", "is required"),
        ("late", "is required"),
    }


# Problems of the dataclasses themselves


def test_problems_carry_value_and_origin():
    first, second = problems("model:\n  hidden_dim: 100\noptimizer:\n  learning_rate: -1\n")
    assert str(first) == (
        "model.num_heads = 12 (default) - must divide model.hidden_dim = 100 - choose a divisor"
    )
    assert (second.setting, second.value) == ("optimizer.learning_rate", "-1")
    assert second.origin == "run.yaml:4"
    with pytest.raises(ConfigError) as caught:
        check(RunConfig(model=Gpt2(hidden_dim=100)))
    assert str(caught.value).startswith("model.num_heads = 12 - must divide")
    check(RunConfig())


def test_a_wrong_shape_elsewhere_does_not_hide_problems():
    found = problems("model: {hidden_dim: 100}\ntrainer: {seed: x}\n")
    assert [problem.setting for problem in found] == ["model.num_heads", "trainer.seed"]


# Other spellings


def test_an_alias_in_a_file_and_the_setting_in_a_flag():
    text = "trainer:\n  learning_rate: 6E-4\n  warmup_ratio: 1\n"
    loaded = resolve(text)
    assert loaded.config.optimizer.learning_rate == 6e-4
    warmup = loaded.config.optimizer.warmup
    assert warmup == 1.0 and isinstance(warmup, float)
    assert loaded.origins["optimizer.learning_rate"] == "run.yaml:2"
    assert "trainer.learning_rate (run.yaml:2) is read as optimizer.learning_rate" in loaded.notices
    loaded = resolve(text, "--optimizer.learning_rate", "1e-3")
    assert loaded.config.optimizer.learning_rate == 1e-3
    loaded = resolve("optimizer: {learning_rate: 1}", "--trainer.learning_rate", "2")
    assert loaded.config.optimizer.learning_rate == 2.0


def test_both_spellings_in_one_layer_are_an_error():
    text = "trainer:\n  learning_rate: 1\noptimizer:\n  learning_rate: 2\n"
    (problem,) = problems(text)
    assert problem.setting == "trainer.learning_rate" and problem.origin == "run.yaml:2"
    assert "optimizer.learning_rate (run.yaml:4)" in problem.rule
    flags = ("--trainer.wandb.name=a", "--trainer.tracker.name=b")
    (problem,) = problems("", *flags)
    assert problem.setting == "trainer.wandb.name"
    assert "trainer.tracker.name (--trainer.tracker.name)" in problem.rule


def test_a_prefix_alias_moves_all_below():
    rows = [Alias("train", "trainer")]
    Path("old.yaml").write_text("train: {seed: 4, axes: {a: b}}\ntrainer: {id: x, axes: {c: d}}\n")
    config = load(RunConfig, ["old.yaml"], aliases=rows).config
    assert (config.trainer.seed, config.trainer.id) == (4, "x")
    assert config.trainer.axes == {"a": "b", "c": "d"}


BOARD = TensorboardConfig()
WANDB = WandbConfig(project="p", name="n")


@pytest.mark.parametrize(
    ("tracker", "expected"),
    [
        ("", WandbConfig(name="n")),
        ("project: p", WANDB),
        ("{type: wandb, project: p}", WANDB),
        ("null", WandbConfig(name="n")),
        ("wandb", WandbConfig(name="n")),
        ("tensorboard", [BOARD, WandbConfig(name="n")]),
        ("{type: tensorboard}", [BOARD, WandbConfig(name="n")]),
        ("[{type: tensorboard}, {type: wandb, project: p}]", [BOARD, WANDB]),
        ("[{project: p}, tensorboard]", [WANDB, BOARD]),
        ("[{type: tensorboard}, console]", [BOARD, ConsoleConfig(), WandbConfig(name="n")]),
        ("[]", [WandbConfig(name="n")]),
    ],
)
def test_the_entry_of_one_type_is_found_or_made(tracker: str, expected: Any):
    text = (
        f"trainer:\n  tracker: {tracker}\n"
        if "{" in tracker or ":" not in tracker
        else (f"trainer:\n  tracker:\n    {tracker}\n")
    )
    if tracker != "null":
        loaded = resolve(text, "--trainer.wandb.name", "n")
    else:
        with pytest.raises(ConfigError):
            resolve(text)
        loaded = resolve(text, "--trainer.wandb.name", "n")
    assert loaded.config.trainer.tracker == expected
    same_layer = text + "  wandb: {name: n}\n"
    if tracker != "null":
        assert resolve(same_layer).config.trainer.tracker == expected


def test_the_entry_joins_a_default_of_another_type():
    @dataclass(frozen=True)
    class Mine:
        tracker: TrackerConfig | list[TrackerConfig] = field(
            default_factory=lambda: TensorboardConfig("mine")
        )

    rows = [Alias("wandb", "tracker", entry_type="wandb")]
    loaded = load(Mine, [], ["--wandb.project=p"], aliases=rows)
    assert loaded.config.tracker == [TensorboardConfig("mine"), WandbConfig(project="p")]
    assert loaded.origins["tracker.0.logdir"] == "default"
    assert loaded.origins["tracker.1.project"] == "--wandb.project"


def test_aliases_reach_into_an_entry():
    loaded = resolve("", "--trainer.wandb.save_old_dumps", "true")
    assert loaded.config.trainer.tracker == WandbConfig(save_dumps=True)
    text = "trainer: {tracker: [{type: wandb, save_old_dumps: true}]}\n"
    assert resolve(text).config.trainer.tracker == [WandbConfig(save_dumps=True)]


def test_an_alias_lies_over_a_bare_word():
    Path("run.yaml").write_text("model: llama\nold: {num_kv_heads: 2}\n")
    rows = [Alias("old.num_kv_heads", "model.num_kv_heads"), Alias("old", "trainer")]
    assert load(RunConfig, ["run.yaml"], aliases=rows).config.model == Llama(num_kv_heads=2)


def test_an_entry_keeps_its_type_over_several_layers():
    text = "trainer: {wandb: {save_old_dumps: {}, save_dumps: {name: z}}}\n"
    (problem,) = problems(text)
    assert (problem.setting, problem.rule) == ("trainer.tracker.save_dumps", "must be bool")


@pytest.mark.parametrize(
    "tracker", ["{tracker: [tensorboard, wandb]}", "{tracker: tensorboard, wandb: {name: n}}"]
)
def test_a_field_of_an_element_is_not_lost_on_a_list(tracker: str):
    (problem,) = problems(f"trainer: {tracker}\n", "--trainer.tracker.project", "p")
    assert problem.rule == "is a list of 2"
    assert problem.advice == "name one: trainer.tracker.0.project"
    assert problem.value == "{project: p}"


# Imports and plugins


def test_imports_register_choices(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    code = (
        "from dataclasses import dataclass\nfrom config_sample import TrackerConfig\n"
        "@TrackerConfig.register_subclass('mine')\n@dataclass(frozen=True)\n"
        "class Mine(TrackerConfig):\n    size: int = 1\n"
    )
    Path("my_tracker_module.py").write_text(code)
    text = "imports: [my_tracker_module]\ntrainer: {tracker: {type: mine, size: 3}}\n"
    with pytest.raises(ConfigError):
        resolve(text, trusted=False)
    assert "my_tracker_module" not in sys.modules
    try:
        assert resolve(text).config.trainer.tracker.size == 3  # type: ignore[union-attr]
    finally:
        TrackerConfig._choice_registry.pop("mine", None)
        sys.modules.pop("my_tracker_module", None)


def test_untrusted_imports_leave_a_notice():
    loaded = resolve("imports: [no_such_module]\n", trusted=False)
    (notice,) = loaded.notices
    assert "no_such_module (run.yaml:1) is not imported" in notice
    assert "--imports no_such_module" in notice and "--trust" in notice


def test_a_failing_import_is_a_problem():
    Path("broken_module.py").write_text("raise RuntimeError('no luck')\n")
    found = problems("imports:\n  - broken_module\n  - no_such_module\ntrainer: {seed: x}\n")
    assert [problem.setting for problem in found] == ["imports.0", "imports.1", "trainer.seed"]
    assert "RuntimeError: no luck" in found[0].rule and found[0].origin == "run.yaml:2"
    assert "ModuleNotFoundError" in found[1].rule


def test_plugins_load_once_when_a_type_is_unknown(monkeypatch: pytest.MonkeyPatch):
    code = (
        "from dataclasses import dataclass\nfrom config_sample import TrackerConfig\n"
        "@TrackerConfig.register_subclass('plugged')\n@dataclass(frozen=True)\n"
        "class Plugged(TrackerConfig):\n    pass\n"
    )
    Path("plugged_module.py").write_text(code)
    calls = []

    def points(group: str) -> list[EntryPoint]:
        calls.append(group)
        return [
            EntryPoint("bad", "no_such_module", group),
            EntryPoint("p", "plugged_module", group),
        ]

    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.setattr(convert, "entry_points", points)
    monkeypatch.setattr(convert, "_loaded_plugins", False)
    try:
        loaded = resolve("trainer: {tracker: plugged}")
        assert type(loaded.config.trainer.tracker).__name__ == "Plugged"
        assert any("plugin bad was not loaded" in notice for notice in loaded.notices)
        problems("trainer: {tracker: nothing}")
        assert calls == ["ostro.plugins"]
    finally:
        TrackerConfig._choice_registry.pop("plugged", None)
        sys.modules.pop("plugged_module", None)
