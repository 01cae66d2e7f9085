"""Speed and memory of one optimisation step: ours against transformers' GPT-2.

    python -m benchmarks.train_step [--json FILE] [--case NAME] [--rounds 5]

Every contender is a process of its own, holds the same weights and gets the same tokens; they
take turns, round by round, while the others sleep, so that noise of the machine meets all of
them. A step is forward, backward, clipping to norm 1 and a fused AdamW update, float32 master
weights, bfloat16 matrix products. Between rounds the parent measures what the machine reaches in
plain matrix products; MFU is 6N + 12LCT operations per token (N: parameters without positions,
L layers, C width, T tokens) against the bfloat16 figure. Memory is the peak resident size of the
process since its start.

Ours keeps freed memory (`ostro.allocator`), as a run does. Peers get the same setting, which makes
them faster, and larger; `--peer_allocator default` measures them as they come.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.peers import transformers_gpt2
from ostro.allocator import keep_freed_memory
from ostro.models import Gpt2Config, initialize
from ostro.optim import apply_update, clip_scale, global_norm

VOCAB = 50304


@dataclass(frozen=True)
class Case:
    """Sizes of a model and of its batch."""

    name: str
    num_layers: int
    hidden_dim: int
    num_heads: int
    seq_len: int
    batch_size: int
    steps: int
    """Steps per round."""

    def config(self) -> Gpt2Config:
        """Our configuration of these sizes."""
        return Gpt2Config(
            seq_len=self.seq_len,
            hidden_dim=self.hidden_dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            gradient_checkpointing=False,
        )

    def flops_per_token(self) -> int:
        """6N + 12LCT."""
        width, layers = self.hidden_dim, self.num_layers
        parameters = VOCAB * width + layers * (12 * width**2 + 13 * width) + 2 * width
        return 6 * parameters + 12 * layers * width * self.seq_len


CASES = [
    Case("gpt2-124m-t1024-b1", 12, 768, 12, 1024, 1, steps=2),
    Case("gpt2-6x384-t256-b12", 6, 384, 6, 256, 12, steps=2),
]


def ours(case: Case, compiled: bool) -> tuple[torch.nn.Module, Callable]:
    """Our model and its mean loss."""
    model = case.config().build(VOCAB, torch.bfloat16)
    initialize(model, 0)
    if compiled:
        for block in model.blocks:
            block.compile()

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        targets = torch.full_like(tokens, -100)
        targets[:, :-1] = tokens[:, 1:]
        return model(tokens, targets, scale=1 / (targets.numel() - len(targets)))

    return model, loss


def theirs(case: Case, compiled: bool) -> tuple[torch.nn.Module, Callable]:
    """transformers' model and its mean loss."""
    source = case.config().build(VOCAB)
    initialize(source, 0)
    model = transformers_gpt2.build(case.config(), VOCAB, source.state_dict())
    run = torch.compile(model) if compiled else model
    return model, lambda tokens: transformers_gpt2.loss(run, tokens)


CONTENDERS: dict[str, tuple[Callable, bool]] = {
    "ours": (ours, False),
    "ours compiled": (ours, True),
    "transformers": (theirs, False),
    "transformers compiled": (theirs, True),
}


def worker(case: Case, contender: str, allocator: str) -> None:
    """Answer each line on stdin with the seconds and loss of one round of steps."""
    build, compiled = CONTENDERS[contender]
    if allocator == "kept" or build is ours:
        keep_freed_memory()
    model, loss = build(case, compiled)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    generator = torch.Generator().manual_seed(0)
    shape = (case.batch_size, case.seq_len)
    tokens = torch.randint(VOCAB, shape, generator=generator)  # one batch: the loss falls
    value = torch.zeros(())

    def step() -> None:
        nonlocal value
        value = loss(tokens)
        value.backward()
        if build is ours:
            norm = global_norm(model.parameters())
            apply_update(optimizer, clip_scale(norm, 1.0), None)
        else:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for line in sys.stdin:
        start = time.perf_counter()
        for _ in range(int(line)):
            step()
        seconds = (time.perf_counter() - start) / int(line)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(
            json.dumps({"seconds": seconds, "loss": value.item(), "peak_bytes": peak}), flush=True
        )


def product_peak(dtype: torch.dtype, seconds: float = 0.3) -> float:
    """Operations per second of a square matrix product, the best of a few tries."""
    size, best = 2048, float("inf")
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def ask(process: subprocess.Popen, steps: int) -> dict:
    """One round of one contender."""
    process.stdin.write(f"{steps}\n")
    process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a contender ended with code {process.wait()}")
    return json.loads(line)


def note(text: str) -> None:
    """Progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


def measure(case: Case, rounds: int, contenders: list[str], allocator: str) -> dict:
    """Interleaved rounds of every contender, and the machine's peak between them."""
    command = [sys.executable, "-m", "benchmarks.train_step", "--case", case.name]
    command += ["--peer_allocator", allocator, "--worker"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    processes = {name: subprocess.Popen([*command, name], **pipes) for name in contenders}
    try:
        first = {}
        for name, process in processes.items():
            start = time.perf_counter()
            first[name] = ask(process, 1)["loss"]
            ask(process, 5)  # until no memory is new any more
            note(f"{name}: ready after {time.perf_counter() - start:.0f} s")
        results: dict[str, list[dict]] = {name: [] for name in contenders}
        peaks: dict[str, list[float]] = {"f32": [], "bf16": []}
        for index in range(rounds):
            for name, process in processes.items():
                results[name].append(ask(process, case.steps))
            seconds = " ".join(f"{results[name][-1]['seconds']:.2f}" for name in contenders)
            note(f"round {index + 1}: {seconds} s/step")
            peaks["f32"].append(product_peak(torch.float32))
            peaks["bf16"].append(product_peak(torch.bfloat16))
    finally:
        for process in processes.values():
            process.stdin.close()
            process.wait()
    peak = {name: max(values) for name, values in peaks.items()}
    return {"peak": peak, **summary(case, first, results, peak["bf16"])}


def summary(case: Case, first: dict, results: dict[str, list[dict]], peak: float) -> dict:
    """Medians of each contender, and ours over the best peer."""
    tokens = case.batch_size * case.seq_len
    table = {}
    for name, rounds in results.items():
        seconds = [each["seconds"] for each in rounds]
        median = statistics.median(seconds)
        table[name] = {
            "seconds": [min(seconds), median, max(seconds)],
            "tokens_per_second": tokens / median,
            "mfu": case.flops_per_token() * tokens / median / peak,
            "peak_bytes": max(each["peak_bytes"] for each in rounds),
            "first_loss": first[name],
            "last_loss": rounds[-1]["loss"],
        }
    speed = {name: row["tokens_per_second"] for name, row in table.items()}
    best_of_ours = max((name for name in speed if name.startswith("ours")), key=speed.get)
    best_peer = max((name for name in speed if not name.startswith("ours")), key=speed.get)
    # Round by round, so that a slow minute of the machine does not count for one side only.
    pairs = zip(results[best_of_ours], results[best_peer], strict=True)
    ratio = statistics.median(peer["seconds"] / our["seconds"] for our, peer in pairs)
    return {
        **asdict(case),
        "ratio": ratio,
        "mfu": table[best_of_ours]["mfu"],
        "memory_ratio": table[best_of_ours]["peak_bytes"] / table[best_peer]["peak_bytes"],
        "best_of_ours": best_of_ours,
        "best_peer": best_peer,
        "contenders": table,
    }


def show(case: dict) -> None:
    """Print a case as a table."""
    peaks = " and ".join(f"{value / 1e9:.0f} ({name})" for name, value in case["peak"].items())
    print(f"\n{case['name']}: matrix products reach {peaks} GFLOP/s")
    print(f"{'':24}{'ms/step (min-max)':>24}{'tokens/s':>10}{'MFU':>7}{'peak MB':>9}{'loss':>16}")
    for name, row in case["contenders"].items():
        low, median, high = (1000 * value for value in row["seconds"])
        losses = f"{row['first_loss']:.4f} {row['last_loss']:.4f}"
        print(f"{name:24}{median:10.0f} ({low:.0f}-{high:.0f})".ljust(48)
              + f"{row['tokens_per_second']:10.0f}{row['mfu']:7.1%}"
              f"{row['peak_bytes'] / 1e6:9.0f}{losses:>16}")  # fmt: skip
    print(f"{case['best_of_ours']} is {case['ratio']:.2f} times {case['best_peer']}, "
          f"with {case['memory_ratio']:.2f} of its memory")  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--case", choices=[case.name for case in CASES], help="only this one")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--peer_allocator", choices=["kept", "default"], default="kept")
    parser.add_argument("--worker", choices=CONTENDERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    cases = [case for case in CASES if options.case in (None, case.name)]
    if options.worker:
        return worker(cases[0], options.worker, options.peer_allocator)
    found = []
    for case in cases:
        found.append(measure(case, options.rounds, options.only, options.peer_allocator))
        show(found[-1])
    if options.json:
        peak = {name: max(case["peak"][name] for case in found) for name in ("f32", "bf16")}
        options.json.write_text(json.dumps({"peak": peak, "cases": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
