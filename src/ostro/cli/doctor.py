"""`ostro verify-resume`, `ostro chaos` and `ostro bench`: what a run survives, and its speed."""

import json
import random
import tempfile
from pathlib import Path

from ostro.cli.arguments import Parser, explained, load_run
from ostro.core.errors import ConfigError, Problem, did_you_mean
from ostro.inspect.bench import bench as measure
from ostro.inspect.bench import report
from ostro.inspect.chaos.run import KINDS, Campaign, ChaosError, table
from ostro.inspect.verify_resume import Plan, check_ranks
from ostro.inspect.verify_resume import verify_resume as verify
from ostro.runtime.signals import Signals


def verify_resume(argv: list[str], signals: Signals) -> None:
    """`ostro verify-resume`: is a run that was killed and resumed the run it would have been?"""
    about = "Train N updates, kill, resume and train N more; compare with 2N in one go, bit by bit."
    parser = Parser("verify-resume", about)
    parser.add_config_path()
    parser.add_count("steps", "updates of each part", default=5, least=2)
    parts = "processes of each part: 1,2,1 resumes in two, then in one"
    parser.add_argument("--ranks", default="1,1", help=parts)
    place = "where to work and leave everything; default: a temporary folder"
    parser.add_argument("--folder", help=place)
    options, flags = parser.parse(argv)
    loaded = load_run(options.config_path, flags, trust=options.trust)
    plan = Plan(options.steps, check_ranks(options.ranks))
    with tempfile.TemporaryDirectory(prefix="ostro-verify-") as temporary:
        folder = Path(options.folder or temporary)
        explained(loaded, lambda: verify(loaded.config, plan, folder))


def chaos(argv: list[str], signals: Signals) -> None:
    """`ostro chaos`: hit many runs, in every phase; each has to end as one that nothing hit."""
    about = "Inject faults into runs of a configuration, and check that nothing is lost by them."
    parser = Parser("chaos", about)
    parser.add_config_path(required=False)
    parser.add_count("each", "faults of each kind in each place", default=10)
    parser.add_count("steps", "updates of a run", default=12)
    parser.add_argument("--seed", type=int, default=0, help="of what is hit when")
    parser.add_argument("--only", action="append", metavar="KIND[@PLACE]", help="; ".join(KINDS))
    parser.add_argument("--folder", help="where to work; what failed is left there")
    options, flags = parser.parse(argv)
    kinds = _kinds(options.only or list(KINDS))
    with tempfile.TemporaryDirectory(prefix="ostro-chaos-") as temporary:
        folder = Path(options.folder or temporary)
        loaded = load_run(options.config_path or _small_run(folder), flags, trust=options.trust)
        campaign = Campaign(loaded.config, folder, options.steps, options.seed)
        rows = explained(loaded, lambda: campaign.run(options.each, kinds))
    print("\n".join(table(rows)))
    if any(row.failures for row in rows.values()):
        raise ChaosError("something was lost - see the failures above")


def bench(argv: list[str], signals: Signals) -> None:
    """`ostro bench`: how fast this configuration trains here, and where the time goes."""
    about = "Train for a while and leave nothing behind: speed, memory, and where the time goes."
    parser = Parser("bench", about)
    parser.add_config_path()
    parser.add_count("steps", "updates of a round", default=5)
    parser.add_count("rounds", "rounds of each, eager and compiled", default=5)
    parser.add_argument("--json", metavar="FILE", help="write the figures to this file")
    options, flags = parser.parse(argv)
    loaded = load_run(options.config_path, flags, trust=options.trust)
    result = explained(loaded, lambda: measure(loaded.config, options.steps, options.rounds))
    print("\n".join(report(result)))
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n")


def _kinds(asked: list[str]) -> dict[str, tuple[str, ...]]:
    kinds: dict[str, tuple[str, ...]] = {}
    for word in asked:
        kind, at, where = word.partition("@")
        if kind not in KINDS or (at and where not in KINDS[kind]):
            known = [f"{k}@{w}" for k, places in KINDS.items() for w in places]
            advice = did_you_mean(word, [*KINDS, *known]) or f"known are {', '.join(known)}"
            raise ConfigError(Problem("--only", "is no fault", advice, word))
        kinds[kind] = (*kinds.get(kind, ()), *([where] if at else KINDS[kind]))
    return kinds


_SMALL_RUN = """
data: {{train_urls: [{folder}/train.jsonl], validation_urls: [{folder}/validation.jsonl],
       cache_dir: {folder}/cache, tokenizer: bytes, shuffle: true, num_workers: 1}}
model: {{type: gpt2, seq_len: 16, hidden_dim: 16, num_layers: 2, num_heads: 2, embed_pdrop: 0.1}}
optimizer: {{learning_rate: 1e-2, warmup: 2, skip_bad_steps: {{rolling_interval_length: 4}}}}
trainer: {{train_batch_size: 8, per_device_parallelism: 2, device: cpu, max_eval_batches: 2}}
"""


def _small_run(folder: Path) -> str:
    """A configuration that trains in half a second, with its text, in a folder."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    words = ["".join(draw.choices("etaoinshrdlu", k=draw.randint(1, 9))) for _ in range(2200)]
    texts = [" ".join(words[i : i + 20]) for i in range(0, 2200, 20)]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "train.jsonl").write_text("".join(lines[:100]))
    (folder / "validation.jsonl").write_text("".join(lines[100:]))
    path = folder / "small.yaml"
    path.write_text(_SMALL_RUN.format(folder=folder.absolute()))
    return str(path)
