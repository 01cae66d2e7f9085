import os
from pathlib import Path

import pytest
from config_sample import ALIASES, RunConfig
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ostro.config import load
from ostro.core.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def error_of(*files: str, flags: list[str] | None = None) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, files, flags or [], aliases=ALIASES)
    return caught.value


def test_six_mistakes_in_two_files_and_a_flag():
    write("opt.yaml", "learning_rate: fast\nwarmpu: 3\n")
    write(
        "run.yaml",
        "model:\n  type: gtp2\ntrainer:\n  seed: 1.5\n  momentum: 0.9\n"
        "optimizer: !include opt.yaml\n",
    )
    error = error_of("run.yaml", flags=["--trainer.save_interval", "5 parsecs"])
    found = {
        (problem.setting, problem.value, problem.origin): str(problem) for problem in error.problems
    }
    assert set(found) == {
        ("model.type", "gtp2", "run.yaml:2"),
        ("trainer.seed", "1.5", "run.yaml:4"),
        ("trainer.momentum", "0.9", "run.yaml:5"),
        ("optimizer.learning_rate", "fast", "opt.yaml:1"),
        ("optimizer.warmpu", "3", "opt.yaml:2"),
        ("trainer.save_interval", "5 parsecs", "--trainer.save_interval"),
    }
    message = str(error)
    assert message.startswith("6 problems in the configuration:\n")
    assert "did you mean gpt2?" in message
    assert "did you mean warmup?" in message
    assert "must be a whole number" in message
    assert "such as 90s, 20m, 1h30m" in message


def test_include_is_relative_to_the_including_file(folder: Path, monkeypatch: pytest.MonkeyPatch):
    write("deep/run.yaml", "trainer: !include parts/trainer.yaml\n")
    write("deep/parts/trainer.yaml", "seed: 3\ntracker: !include more/tracker.yaml\n")
    write("deep/parts/more/tracker.yaml", "# a comment\nproject: mine\n")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    loaded = load(RunConfig, ["../deep/run.yaml"])
    assert loaded.config.trainer.seed == 3
    assert loaded.config.trainer.tracker.project == "mine"
    assert loaded.origins["trainer.seed"] == "../deep/parts/trainer.yaml:1"
    assert loaded.origins["trainer.tracker.project"] == "../deep/parts/more/tracker.yaml:2"


def test_include_gives_exactly_what_stands_in_the_file():
    write("data.yaml", "a:\n    - 'gs://b/x.{1..128}-of-128.gz'\nb: 'gs://b/tokens/'\n")
    write("run.yaml", "trainer:\n    axes: !include data.yaml\n    seed: 1000000\n")
    write(
        "expanded.yaml",
        "trainer:\n    axes:\n        a:\n            - 'gs://b/x.{1..128}-of-128.gz'\n"
        "        b: 'gs://b/tokens/'\n    seed: 1000000\n",
    )
    assert load(RunConfig, ["run.yaml"]).config == load(RunConfig, ["expanded.yaml"]).config


def test_include_loop_names_the_chain():
    write("a.yaml", "trainer: !include b.yaml\n")
    write("b.yaml", "axes: !include a.yaml\n")
    problem = error_of("a.yaml").problems[0]
    assert problem.origin == "b.yaml:1"
    assert "a.yaml -> b.yaml -> a.yaml" in problem.rule


def test_missing_include_names_the_including_line():
    write("a.yaml", "model: {}\ntrainer: !include trainre.yaml\n")
    write("trainer.yaml", "seed: 3\n")
    (problem,) = error_of("a.yaml").problems
    assert problem.origin == "a.yaml:2"
    assert "trainre.yaml" in problem.rule
    assert problem.advice == "did you mean trainer.yaml?"


def test_bare_include_at_the_top_shows_the_right_form():
    write("a.yaml", "# nothing but\n!include base.yaml\n")
    (problem,) = error_of("a.yaml").problems
    assert problem.origin == "a.yaml:2"
    assert "key: !include base.yaml" in problem.advice


def test_include_as_a_merge_lies_under_the_file():
    write(
        "base.yaml", "trainer:\n  seed: 1\n  id: base\nmodel:\n  type: llama\n  num_kv_heads: 2\n"
    )
    write("run.yaml", "<<: !include base.yaml\ntrainer:\n  seed: 2\nmodel:\n  type: gpt2\n")
    loaded = load(RunConfig, ["run.yaml"])
    assert (loaded.config.trainer.seed, loaded.config.trainer.id) == (2, "base")
    assert loaded.origins["trainer.id"] == "base.yaml:3"
    assert type(loaded.config.model).__name__ == "Gpt2"  # the base's fields went with its type


def test_anchors_merge():
    write(
        "run.yaml",
        "model: &m\n  hidden_dim: 64\n  num_heads: 4\n"
        "trainer:\n  axes:\n    <<: *m\n    num_heads: other\n",
    )
    axes = load(RunConfig, ["run.yaml"]).config.trainer.axes
    assert axes == {"hidden_dim": "64", "num_heads": "other"}


def test_duplicate_keys_name_both_lines():
    write("run.yaml", "trainer:\n  seed: 1\n  id: x\n  seed: 2\n")
    (problem,) = error_of("run.yaml").problems
    assert (problem.setting, problem.origin) == ("seed", "run.yaml:4")
    assert "run.yaml:2" in problem.rule


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!other", "!!binary"])
def test_other_tags_are_refused(tag: str):
    write("run.yaml", f"trainer:\n  id: {tag} [x]\n")
    (problem,) = error_of("run.yaml").problems
    assert problem.origin == "run.yaml:2"
    assert "unknown tag" in problem.rule


def test_invalid_yaml_names_line_and_expectation():
    write("run.yaml", "trainer:\n  seed: 1\n  axes: [a, b\nmodel: {}\n")
    (problem,) = error_of("run.yaml").problems
    assert problem.origin == "run.yaml:4"
    assert "expected" in problem.rule


def test_missing_file_says_where_it_looked_and_a_near_name():
    write("config/small.yaml", "{}")
    with pytest.raises(ConfigError) as caught:
        load(RunConfig, ["smal.yaml"], search=[Path("config")])
    (problem,) = caught.value.problems
    assert "smal.yaml" in problem.rule and os.path.join("config", "smal.yaml") in problem.rule
    assert problem.advice == "did you mean small.yaml?"


@pytest.mark.parametrize("name", ["small", "small.yaml"])
def test_files_are_found_in_search_folders_and_without_suffix(name: str):
    write("config/small.yaml", "trainer: {seed: 5}")
    assert load(RunConfig, [name], search=[Path("config")]).config.trainer.seed == 5


def test_json_and_urls_are_read():
    import fsspec

    write("run.json", '{"trainer": {"seed": 5, "id": "07"}}')
    assert load(RunConfig, ["run.json"]).config.trainer.id == "07"
    with fsspec.open("memory://configs/run.yaml", "w") as stream:
        stream.write("trainer: !include trainer.yaml\n")
    with fsspec.open("memory://configs/trainer.yaml", "w") as stream:
        stream.write("seed: 8\n")
    loaded = load(RunConfig, ["memory://configs/run.yaml"])
    assert loaded.config.trainer.seed == 8
    assert loaded.origins["trainer.seed"] == "memory://configs/trainer.yaml:1"


def test_laughing_aliases_and_deep_nesting_are_errors():
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for name, below in zip("bcdefghi", "abcdefgh", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{below}'] * 10)}]")
    write("bomb.yaml", "\n".join(lines))
    assert "values once its aliases are expanded" in str(error_of("bomb.yaml"))
    write("deep.yaml", "trainer: " + "[" * 5000 + "]" * 5000)
    assert "deeper than 64" in str(error_of("deep.yaml"))
    write("self.yaml", "trainer: &t\n  axes: *t\n")
    assert "deeper than 64" in str(error_of("self.yaml"))


def test_empty_files_and_sections_are_defaults():
    write("run.yaml", "# nothing\n")
    assert load(RunConfig, ["run.yaml"]).config == RunConfig()
    write("run.yaml", "trainer:\nmodel:\n")
    assert load(RunConfig, ["run.yaml"]).config == RunConfig()


_NAMES = "trainer seed model type tracker null wandb imports optimizer schedule cycles axes keep"
_SIGNS = "!include |- |: |a: | |\n|\n  |\t|!!str |&a |*a |<<|~|1|0|\\UFFFFFFFF|\x00|\ud800"
_WORDS = st.sampled_from([*_NAMES.split(), *_SIGNS.split("|"), *"{}[]:,-&*!|>%@`?#<\"'"])


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(_WORDS, max_size=25).map("".join) | st.text(max_size=40))
def test_random_text_raises_nothing_but_config_errors(text: str):
    Path("fuzz.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    for files, flags in [(["fuzz.yaml"], []), ([], ["--trainer", text]), ([], [text, text])]:
        try:
            load(RunConfig, files, flags, aliases=ALIASES, trusted=False)
        except ConfigError as error:
            assert error.problems
