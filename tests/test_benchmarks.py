"""The benchmarks fit together: their shape, their page, and what they compute from figures."""

import importlib.util
import sys

import pytest

from benchmarks import agreement, common, train_step
from benchmarks.all import MODULES, PAGE, rewritten
from benchmarks.ours import CASES, load_case
from ostro.trainer import build_model


def test_every_benchmark_has_a_place_on_the_page_and_the_common_shape():
    page = PAGE.read_text()
    for name in MODULES:
        assert page.count(f"<!-- begin {name} -->\n") == page.count(f"<!-- end {name} -->\n") == 1
        if importlib.util.find_spec(f"benchmarks.{name}"):
            module = importlib.import_module(f"benchmarks.{name}")
            assert callable(module.measure) and callable(module.show), name


def test_tables_are_replaced_and_the_rest_of_the_page_stays():
    page = "a\n<!-- begin x -->\nold\n<!-- end x -->\nb\n<!-- begin y -->\n<!-- end y -->\n"
    once = rewritten(page, {"x": r"new \1"})
    assert once == page.replace("old", r"new \1")
    assert rewritten(once, {"x": r"new \1"}) == once
    with pytest.raises(SystemExit, match="no markers for z"):
        rewritten(page, {"z": ""})


def test_contenders_answer_in_turns_and_what_they_print_is_no_answer():
    code = "from benchmarks.common import serve; serve(lambda n: print('noise') or 2 * n)"
    command = [sys.executable, "-c", code]
    with common.workers({"a": command, "b": command}) as started:
        calls = {name: lambda w=w, n=n: w.ask(n) for n, (name, w) in enumerate(started.items())}
        assert common.take_turns(calls, 2) == {"a": [0, 0], "b": [2, 2]}
    assert all(worker.process.returncode == 0 for worker in started.values())


def test_ratios_are_taken_round_by_round():
    assert common.paired_ratio([2, 20, 6], [1, 10, 2]) == {"min": 2, "median": 2, "max": 3}


@pytest.mark.parametrize("case", CASES)
def test_operations_count_every_parameter_but_positions(case):
    config = load_case(case, ["--model.num_layers", "1"])
    sizes = train_step.sizes_of(config)
    model = build_model(config.model, config.trainer, config.vocab_size, None)
    counted = sum(p.numel() for name, p in model.named_parameters() if "position" not in name)
    attention = 12 * sizes["hidden_dim"] * sizes["seq_len"]
    assert train_step.flops_per_token(sizes) == 6 * counted + attention


def test_curves_that_part_do_not_agree():
    near = agreement.difference([3.0] * 100, [3.001, 2.999] * 50)
    assert near["mean_absolute"] == pytest.approx(0.001)
    assert near["mean_of_last_20"] == pytest.approx(0)
    parting = agreement.difference([3.0] * 100, [3.0] * 80 + [3.1] * 20)
    assert parting["largest"] == pytest.approx(0.1)
    assert parting["mean_of_last_20"] == pytest.approx(-0.1)
