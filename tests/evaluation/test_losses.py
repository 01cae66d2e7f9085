"""Averages over tokens, tags and bytes."""

import math

import pytest

from ostro.evaluation.losses import Totals, summarize


def test_micro_average_weighs_tokens_and_macro_weighs_sets():
    totals = {"a": Totals(200.0, 100, 400), "b": Totals(1200.0, 300, 900)}
    metrics = summarize(totals, {"a": ["x/one"], "b": ["x/two"]})
    assert metrics["eval/loss"] == 3.5
    assert metrics["eval/macro_loss"] == 3.0
    assert metrics["eval/x/loss"] == 3.5
    assert metrics["eval/x/macro_loss"] == 3.0
    assert metrics["eval/x/one/loss"] == metrics["eval/a/loss"] == 2.0


def test_bits_per_byte_is_total_bits_over_total_bytes():
    nats = math.log(2)
    totals = Totals(100 * nats, 10, 50)
    totals.add(Totals(30 * nats, 20, 30))
    assert totals.bits_per_byte == pytest.approx(130 / 80)


def test_one_set_has_no_macro_average():
    metrics = summarize({"validation": Totals(20.0, 10, 0)}, {"validation": []})
    assert metrics == {"eval/loss": 2.0, "eval/perplexity": pytest.approx(math.exp(2))}


def test_nan_stays_nan():
    metrics = summarize({"a": Totals(math.nan, 10, 5)}, {})
    assert math.isnan(metrics["eval/loss"]) and math.isnan(metrics["eval/perplexity"])
