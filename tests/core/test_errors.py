"""The errors' texts: setting = value (origin) - rule - what to do."""

import pytest

from ostro.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    OstroError,
    Problem,
    did_you_mean,
)


def test_a_problem_reads_setting_value_origin_rule_advice():
    problem = Problem("model.num_heads", "must divide 100", "use 10", "12", "a.yaml:3")
    assert str(problem) == "model.num_heads = 12 (a.yaml:3) - must divide 100 - use 10"


def test_missing_parts_leave_no_trace():
    assert str(Problem("seed", "is required")) == "seed - is required"
    assert str(Problem("seed", "is required", value="null")) == "seed = null - is required"


def test_one_problem_is_one_line():
    error = ConfigError(Problem("seed", "must be a whole number"))
    assert str(error) == "seed - must be a whole number"
    assert [problem.setting for problem in error.problems] == ["seed"]


def test_several_problems_are_counted_and_listed():
    error = ConfigError([Problem("a", "is bad"), Problem("b", "is worse")])
    assert str(error).splitlines() == [
        "2 problems in the configuration:",
        "  a - is bad",
        "  b - is worse",
    ]


def test_a_plain_text_has_no_problems():
    error = ConfigError("no such file: x.yaml")
    assert (str(error), error.problems) == ("no such file: x.yaml", [])


@pytest.mark.parametrize("kind", [ConfigError, DataError, CheckpointError])
def test_all_are_what_a_command_reports_without_a_traceback(kind):
    assert issubclass(kind, OstroError)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("num_head", "did you mean num_heads?"),
        ("NUM_HEADS", "did you mean num_heads?"),
        ("hiden_dim", "did you mean hidden_dim?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_nearest_name(name, expected):
    assert did_you_mean(name, ["num_heads", "hidden_dim", "seq_len"]) == expected


def test_the_nearest_name_keeps_its_own_case():
    assert did_you_mean("adamw", ["AdamW"]) == "did you mean AdamW?"
