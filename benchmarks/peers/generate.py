"""transformers' `generate` for GPT-2 124M, greedy: answers each request with its seconds.

    python -m benchmarks.peers.generate PRECISION MODE

PRECISION is float32 or bfloat16, for weights and computation. MODE is eager (a cache that grows),
or compiled: a static cache, the step compiled with the weights frozen.
"""

import sys
import time

import torch
from torch._inductor import config as inductor_config
from transformers import GPT2Config, GPT2LMHeadModel

from benchmarks import common


def main(precision: str, mode: str) -> None:
    """Build the model; a request is the prompt's tokens and the number of new ones."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50304, attn_implementation="sdpa")
    model = GPT2LMHeadModel(config).eval().to(getattr(torch, precision))
    model.generation_config.eos_token_id = None
    if mode == "compiled":
        inductor_config.freezing = True
        model.generation_config.cache_implementation = "static"
        model.forward = torch.compile(model.forward)

    @torch.no_grad()
    def answer(request: dict) -> float:
        tokens = torch.tensor([request["prompt"]])
        start = time.perf_counter()
        model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=request["new"],
            do_sample=False,
            pad_token_id=0,
        )
        return time.perf_counter() - start

    common.serve(answer)


if __name__ == "__main__":
    main(*sys.argv[1:])
