"""The training loop around a peer's model: plain torch, fused AdamW, gradients clipped to norm 1.

    python -m benchmarks.peers.step '{"peer": "litgpt_models", "compiled": true, ...}'

A worker of `benchmarks.train_step`; imports torch and the peer only.
"""

import importlib
import json
import sys
import time

import torch

from benchmarks.common import peak_memory, serve


def main(settings: dict) -> None:
    """Answer each request, a number of steps, with seconds per step, loss and peak memory."""
    peer = importlib.import_module(f"benchmarks.peers.{settings['peer']}")
    model = peer.build(settings).train()
    run = torch.compile(model) if settings["compiled"] else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)
    shape = (settings["batch_size"], settings["seq_len"])
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(settings["vocab_size"], shape, generator=generator)

    def step() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings["dtype"] == "bf16"):
            loss = peer.loss(run, tokens)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def answer(num_steps: int) -> dict:
        start = time.perf_counter()
        for _ in range(num_steps):
            loss = step()
        seconds = (time.perf_counter() - start) / num_steps
        return {"seconds": seconds, "loss": loss.item(), "peak_bytes": peak_memory()}

    serve(answer)


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
