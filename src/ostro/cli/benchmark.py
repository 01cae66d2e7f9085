"""`ostro benchmark`: scores of a checkpoint on the benchmarks of lm-evaluation-harness."""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ostro.checkpoint import Saved, SavedFile
from ostro.cli.arguments import Parser
from ostro.cli.native import open_checkpoint, saved_config
from ostro.core.errors import ConfigError, Problem
from ostro.core.redaction import redact
from ostro.core.units import columns
from ostro.distributed import pick_device
from ostro.evaluation.harness import load_benchmarks, run_harness
from ostro.runtime.signals import Signals
from ostro.train_lm import load_model, load_tokenizer


def benchmark(argv: list[str], signals: Signals) -> None:
    """`ostro benchmark`: print a checkpoint's scores, and keep them where `--output` says."""
    parser = Parser("benchmark", "Score a checkpoint on benchmarks.", settings=None)
    parser.add_checkpoint()
    add_benchmark_options(parser)
    parser.add_argument("--output", metavar="DIR", help="folder for a JSON file of the scores")
    options, _ = parser.parse(argv)
    score(open_checkpoint(options.checkpoint), options, options.output)


def add_benchmark_options(parser: Parser) -> None:
    """What `ostro benchmark` and `evaluate.py` share."""
    known = "superglue, lambada, triviaqa, piqa, or any task of the harness"
    parser.add_argument("--benchmark", metavar="NAME", nargs="+", required=True, help=known)
    parser.add_count("limit", "questions of each task; default all")
    parser.add_count("num_fewshot", "solved examples before each question", least=0, metavar="K")
    parser.add_argument("--task_folder", metavar="DIR", help="more task descriptions (YAML)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")


def score(saved: Saved | SavedFile, options: Namespace, output: str | Path | None) -> None:
    """Evaluate a checkpoint, print a table, and write a JSON file into `output`."""
    if options.task_folder is not None and not Path(options.task_folder).is_dir():
        rule, advice = "no such folder", "correct the path"
        raise ConfigError(Problem("--task_folder", rule, advice, options.task_folder))
    device = pick_device(options.device)
    benchmarks = load_benchmarks(options.benchmark, options.task_folder)
    tokenizer = load_tokenizer(saved)
    model = load_model(saved, saved_config(saved, options), tokenizer, device)
    scores = run_harness(
        model, tokenizer, benchmarks, limit=options.limit, num_fewshot=options.num_fewshot
    )
    print("\n".join(table(scores)))
    if output is not None:
        now = datetime.now(UTC)
        found = {
            "checkpoint": redact(saved.path),
            "step": saved.step,
            "date": now.isoformat(timespec="seconds"),
            "lm_eval": version("lm_eval"),
            "limit": options.limit,
            "benchmarks": scores,
        }
        path = Path(output) / f"step-{saved.step}-{now:%Y%m%d-%H%M%S-%f}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"\nscores: {path}")


def table(scores: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Lines with a row for each metric; the harness writes them `metric,filter`."""
    rows = [("benchmark", "task", "metric", "value", "stderr")]
    for name, found in scores.items():
        for task, metrics in found["results"].items():
            for key, value in metrics.items():
                metric, _, chosen = key.partition(",")
                if not metric.endswith("_stderr"):
                    error = metrics.get(f"{metric}_stderr,{chosen}")
                    rows.append((name, task, metric, _short(value), _short(error)))
    return columns(rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "-"
