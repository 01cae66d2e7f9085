"""Speed and memory of one optimisation step: ours against transformers and litgpt.

    python -m benchmarks.train_step [--rounds 5] [--json FILE] [--case NAME ...] [--picks FILE]

Every contender is a process of its own; they take turns, round by round, while the others sleep, so
that noise of the machine meets all of them. A step is forward, backward, clipping to norm 1 and a
fused AdamW update of float32 weights, on one batch of random tokens. Ours is the trainer's own loop
with a configuration of `benchmarks/configs`.

First each peer's best setting is found, alone: eager or compiled, float32 or bfloat16 autocast, the
C library keeping freed memory, as ours does, or not. Only that one takes part in the rounds, and
ours, eager and compiled, in its precision: the ratio is of those. Where that is float32, ours in
bfloat16 takes part too; the last column is the quotient of its median and that peer's.
`--picks FILE` keeps what was found, and takes what is there.

MFU is 6N + 12LCT operations per token (N: parameters without positions, L layers, C width, T
tokens) against what matrix products in bfloat16 reach between the rounds. Memory is the peak
resident size of the process since its start.

litgpt wants other versions of what transformers needs: install it in an environment of its own, and
name its interpreter in LITGPT_PYTHON.
"""

import argparse
import importlib.util
import itertools
import json
import os
import re
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.ours import CASES, build_trainer, fit, load_case, random_batch
from ostro.lm_config import TrainLmConfig

PEERS = {"transformers": "transformers_models", "litgpt": "litgpt_models"}
MP = {"bf16": "p=f32,c=bfloat16", "f32": "f32"}
# What `ostro.runtime.malloc` does in our process; glibc reads it at start.
KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647",
        "MALLOC_TOP_PAD_": "67108864", "THP_MEM_ALLOC_ENABLE": "1"}  # fmt: skip

Setting = dict[str, Any]
"""Who, and how: `{"peer": ..., "compiled": bool, "dtype": "bf16", "kept": bool}`."""


def ours(case: str, setting: Setting) -> None:
    """Our side of `common.serve`: a number of steps in, seconds, loss and memory out."""
    flags = ["--trainer.mp", MP[setting["dtype"]]]
    flags += ["--trainer.compile", str(setting["compiled"]).lower()]
    config = load_case(case, flags)
    trainer, batch = build_trainer(config), random_batch(config)

    def answer(num_steps: int) -> dict[str, float]:
        start = time.perf_counter()
        fit(trainer, batch, num_steps)
        seconds = (time.perf_counter() - start) / num_steps
        with torch.no_grad():
            loss = trainer.engine.model(batch.tokens, batch.targets) / trainer.engine.count_targets(
                batch
            )
        return {"seconds": seconds, "loss": loss.item(), "peak_bytes": common.peak_memory()}

    common.serve(answer)


def sizes_of(config: TrainLmConfig) -> dict[str, Any]:
    """What a peer has to build."""
    model: Any = config.model
    llama = hasattr(model, "intermediate_dim")
    return {
        "family": "llama" if llama else "gpt2",
        "seq_len": model.seq_len,
        "hidden_dim": model.hidden_dim,
        "num_layers": model.num_layers,
        "num_heads": model.num_heads,
        "mlp_dim": model.intermediate_dim if llama else 4 * model.hidden_dim,
        "vocab_size": config.vocab_size,
        "batch_size": config.trainer.train_batch_size,
    }


def flops_per_token(sizes: Mapping[str, Any]) -> int:
    """6N + 12LCT."""
    width, layers, mlp = sizes["hidden_dim"], sizes["num_layers"], sizes["mlp_dim"]
    per_layer = 4 * width**2 + (3 if sizes["family"] == "llama" else 2) * width * mlp
    biases_and_norms = 9 * width + mlp if sizes["family"] == "gpt2" else 2 * width
    last_norm = 2 * width if sizes["family"] == "gpt2" else width
    parameters = sizes["vocab_size"] * width + layers * (per_layer + biases_and_norms) + last_norm
    return 6 * parameters + 12 * layers * width * sizes["seq_len"]


def start(case: str, setting: Setting) -> common.Worker:
    """The process of a contender."""
    python, environment = sys.executable, KEPT if setting["kept"] else {}
    if setting["peer"] == "ours":
        command = ["-m", "benchmarks.train_step", "--case", case, "--worker", json.dumps(setting)]
        return common.Worker([python, *command])
    if setting["peer"] == "litgpt":
        python = os.environ.get("LITGPT_PYTHON", python)
    told = sizes_of(load_case(case)) | setting | {"peer": PEERS[setting["peer"]]}
    root = str(Path(__file__).parents[1])
    return common.Worker(
        [python, "-m", "benchmarks.peers.step", json.dumps(told)],
        {**environment, "PYTHONPATH": root},
    )


def label(setting: Setting) -> str:
    """A setting in words."""
    words = [setting["peer"], "compiled" if setting["compiled"] else "eager", setting["dtype"]]
    return " ".join(words) + ("" if setting["kept"] else ", default malloc")


def try_out(case: str, setting: Setting) -> dict[str, float]:
    """Its figures alone, after memory and compilation have settled."""
    worker = start(case, setting)
    try:
        worker.ask(4)
        each = worker.ask(1)["seconds"]
        found = [worker.ask(max(1, round(0.5 / each))) for _ in range(3)]
    finally:
        worker.close()
    best = min(found, key=lambda answer: answer["seconds"])
    common.note(f"{case}, {label(setting)}: {1000 * best['seconds']:.1f} ms")
    return best


def pick(case: str, peer: str) -> dict[str, Any]:
    """The best setting of a peer, and the figures of all that were tried.

    Compiled only in the precision that is not hopeless: within one and a half times the other.
    """
    tried: list[tuple[Setting, dict[str, float]]] = []

    def attempt(compiled: bool, dtype: str, kept: bool) -> float:
        setting = {"peer": peer, "compiled": compiled, "dtype": dtype, "kept": kept}
        tried.append((setting, try_out(case, setting)))
        return tried[-1][1]["seconds"]

    eager = {dtype: attempt(False, dtype, True) for dtype in ("bf16", "f32")}
    for dtype, seconds in eager.items():
        if seconds <= 1.5 * min(eager.values()):
            attempt(True, dtype, True)
    best, _ = min(tried, key=lambda each: each[1]["seconds"])
    attempt(best["compiled"], best["dtype"], False)
    best, _ = min(tried, key=lambda each: each[1]["seconds"])
    return {"best": best, "tried": [{"setting": s, **found} for s, found in tried]}


def pick_all(case: str, file: Path | None) -> dict[str, Any]:
    """`pick` for every peer, shared_choice in a file."""
    known = json.loads(file.read_text()) if file and file.exists() else {}
    of_case = known.setdefault(case, {})
    for peer in available():
        if peer not in of_case:
            of_case[peer] = pick(case, peer)
            if file:
                file.write_text(json.dumps(known, indent=2) + "\n")
    return of_case


def run_case(case: str, rounds: int, picks: Path | None) -> dict[str, Any]:
    """Interleaved rounds of ours and the peers at their best, the machine's peak between them."""
    found = pick_all(case, picks)
    settings = [each["best"] for each in found.values()]
    best = min(
        (each for peer in found.values() for each in peer["tried"]),
        key=lambda each: each["seconds"],
        default=None,
    )
    dtype = "bf16" if best is None else best["setting"]["dtype"]
    for compiled, own in itertools.product((False, True), sorted({dtype, "bf16"})):
        settings.append({"peer": "ours", "compiled": compiled, "dtype": own, "kept": True})
    workers = {label(setting): start(case, setting) for setting in settings}
    try:
        steps = {}
        for name, worker in workers.items():
            first = worker.ask(6)  # until no memory is new any more
            steps[name] = max(1, round(1.5 / worker.ask(1)["seconds"]))
            common.note(f"{case}, {name}: ready, loss {first['loss']:.4f}")
        calls: dict[str, Any] = {
            name: lambda worker=worker, name=name: worker.ask(steps[name])
            for name, worker in workers.items()
        }
        calls["peak"] = lambda: common.matrix_peak(torch.bfloat16, seconds=0.3)
        answers = common.take_turns(calls, rounds)
    finally:
        for worker in workers.values():
            worker.close()
    peak = max(answers.pop("peak"))
    return {"case": case, "picks": found, "peak_bf16": peak, **summary(case, answers, peak, dtype)}


def available() -> list[str]:
    """The peers that are installed."""
    found = ["transformers"] if importlib.util.find_spec("transformers") else []
    if "LITGPT_PYTHON" in os.environ or importlib.util.find_spec("litgpt"):
        found.append("litgpt")
    return found


def summary(
    case: str, answers: Mapping[str, Sequence[dict]], peak: float, dtype: str
) -> dict[str, Any]:
    """Spreads of each contender, and the best of ours in that precision against the best peer."""
    sizes = sizes_of(load_case(case))
    tokens, contenders, seconds = sizes["batch_size"] * sizes["seq_len"], {}, {}
    for name, rounds in answers.items():
        seconds[name] = [each["seconds"] for each in rounds]
        middle = statistics.median(seconds[name])
        contenders[name] = {
            "seconds": common.spread(seconds[name]),
            "tokens_per_second": tokens / middle,
            "mfu": flops_per_token(sizes) * tokens / middle / peak,
            "peak_bytes": max(each["peak_bytes"] for each in rounds),
            "loss": rounds[-1]["loss"],
        }
    by_speed = sorted(contenders, key=lambda name: contenders[name]["seconds"]["median"])
    best = next(name for name in by_speed if re.match(f"ours.*{dtype}", name))
    result = {"contenders": contenders, "ours": best, "mfu": contenders[best]["mfu"]}
    if peers := [name for name in by_speed if not name.startswith("ours")]:
        memory = {name: contenders[name]["peak_bytes"] for name in (best, peers[0])}
        result |= {
            "peer": peers[0],
            "ratio": common.paired_ratio(seconds[peers[0]], seconds[best]),
            "memory_ratio": memory[best] / memory[peers[0]],
        }
    return result


def measure(rounds: int, cases: Sequence[str] = CASES, picks: Path | None = None) -> dict[str, Any]:
    """All cases; `picks`: a file for the peers' best settings."""
    found = [run_case(case, rounds, picks) for case in cases]
    return {"cases": {each["case"]: each for each in found}}


def show(result: dict[str, Any]) -> str:
    """A table of ratios, and one of the contenders of each case."""
    header = ["case", "times as fast as the best peer", "which is", "memory of its", "MFU",
              "ours in bfloat16"]  # fmt: skip
    rows, parts = [], []
    for name, case in result["cases"].items():
        if "ratio" in case:
            ratio, memory = common.figure(case["ratio"], digits=2), f"{case['memory_ratio']:.2f}"
            middle = {who: row["seconds"]["median"] for who, row in case["contenders"].items()}
            own = min(middle[who] for who in middle if re.match("ours.*bf16", who))
            times = f"{middle[case['peer']] / own:.2f}"
            rows.append([name, f"**{ratio}**", case["peer"], memory, f"{case['mfu']:.0%}", times])
        parts.append(f"{name}, matrix products reach {case['peak_bf16'] / 1e9:.0f} GFLOP/s:")
        lines = [
            [who, common.figure(row["seconds"], 1000, 1), f"{row['tokens_per_second']:.0f}",
             f"{row['mfu']:.1%}", f"{row['peak_bytes'] / 1e6:.0f}"]
            for who, row in case["contenders"].items()
        ]  # fmt: skip
        tried = [each for peer in case["picks"].values() for each in peer["tried"]]
        lines += [
            [f"alone: {label(each['setting'])}", f"{1000 * each['seconds']:.1f}", "", "",
             f"{each['peak_bytes'] / 1e6:.0f}"]
            for each in tried
        ]  # fmt: skip
        parts.append(common.table(["", "ms a step", "tokens/s", "MFU", "peak MB"], lines))
    return "\n\n".join([common.table(header, rows), *parts])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--case", nargs="+", choices=CASES, default=CASES)
    parser.add_argument("--picks", type=Path, help="file of the peers' best settings")
    parser.add_argument("--worker", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        return ours(options.case[0], options.worker)
    result = measure(options.rounds, options.case, options.picks)
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
