"""Speed of generation: GPT-2 124M, one row, 128 greedy tokens after a short prompt.

    python -m benchmarks.generation [--rounds N] [--json FILE]

Beside transformers' `generate`, with float32 and bfloat16 weights, eager and compiled with a static
cache. Weights are random: the time does not depend on them. A token needs all weights of the
blocks and of the head once, so the bytes of these by the bandwidth of a plain read are the limit.
"""

import sys
import time
from typing import Any

import torch

from benchmarks import common
from ostro.generate.cpu_decoder import in_compute_dtype
from ostro.generate.sampling import generate
from ostro.models import Gpt2Config, initialize

PROMPT, NEW_TOKENS, VOCAB = [464, 3290, 318, 257], 128, 50304
CONFIG = Gpt2Config()


def bytes_per_token(dtype: torch.dtype) -> int:
    """Of the weights that a token reads: blocks and head."""
    width = CONFIG.hidden_dim
    return dtype.itemsize * (CONFIG.num_layers * (12 * width**2 + 13 * width) + VOCAB * width)


def serve_ours(precision: str) -> None:
    """The worker: answers requests with the seconds that `generate` takes."""
    model = CONFIG.build(VOCAB, getattr(torch, precision))
    initialize(model, 0)

    def answer(request: dict[str, Any]) -> float:
        start = time.perf_counter()
        generate(model, [request["prompt"]], max_new_tokens=request["new"], temperature=0.0)
        return time.perf_counter() - start

    with in_compute_dtype(model):  # once for all calls, as the peers' weights are
        common.serve(answer)


def measure(rounds: int) -> dict[str, Any]:
    """Interleaved rounds of all contenders, and of the read that limits them."""
    peer = [sys.executable, "-m", "benchmarks.peers.generate"]
    commands: dict[str, list[str]] = {}
    for precision in ("float32", "bfloat16"):
        commands[f"ostro {precision}"] = [sys.executable, "-m", __spec__.name, "--serve", precision]
        for mode in ("eager", "compiled"):
            commands[f"transformers {precision} {mode}"] = [*peer, precision, mode]
    request = {"prompt": PROMPT, "new": NEW_TOKENS}
    with common.workers(commands) as started:
        for name, worker in started.items():
            common.note(f"{name}: first call {worker.ask(request):.1f} s")
        calls: dict[str, Any] = {
            name: lambda worker=worker: worker.ask(request) for name, worker in started.items()
        }
        found = common.take_turns({**calls, "read": common.read_bandwidth}, rounds)
    bandwidth = max(found.pop("read"))
    peers = [name for name in found if not name.startswith("ostro")]
    ours = found["ostro bfloat16"]
    return {
        "bytes_per_second": bandwidth,
        "bytes_per_token": bytes_per_token(torch.bfloat16),
        "seconds_per_token": {
            name: common.spread(each / NEW_TOKENS for each in values)
            for name, values in found.items()
        },
        "ratio": {name: common.paired_ratio(found[name], ours) for name in peers},
    }


def show(result: dict[str, Any]) -> str:
    """A row for each contender."""
    rows, limit = [], result["bytes_per_token"] / result["bytes_per_second"]
    for name, seconds in result["seconds_per_token"].items():
        ratio = result["ratio"].get(name)
        times = common.figure(ratio, digits=2) if ratio else ""
        rows.append([name, common.figure(seconds, 1000, 2), times])
    header = ["", "ms per token", "ostro bfloat16 is so many times as fast"]
    share = limit / result["seconds_per_token"]["ostro bfloat16"]["median"]
    about = (
        f"bfloat16 weights of {result['bytes_per_token'] / 1e6:.0f} MB read once at"
        f" {result['bytes_per_second'] / 1e9:.1f} GB/s take {limit * 1000:.2f} ms, which is"
        f" {share:.0%} of a token's time:"
    )
    return f"{about}\n\n{common.table(header, rows)}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve_ours(sys.argv[2])
    else:
        common.command_line(measure, show, __doc__)
