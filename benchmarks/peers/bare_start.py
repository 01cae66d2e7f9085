"""A training script with nothing but torch: a GPT of 4 x 128, its first update, one line.

python -m benchmarks.peers.bare_start TEXT
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

WIDTH, HEADS, LAYERS, TOKENS, BATCH, VOCAB = 128, 4, 4, 64, 12, 256


class Block(nn.Module):
    """Attention and MLP."""

    def __init__(self):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        """(batch, position, width) -> the same."""
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def main(path: str) -> None:
    """One update."""
    text = torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8).long()
    embedding, positions = nn.Embedding(VOCAB, WIDTH), nn.Parameter(torch.zeros(TOKENS, WIDTH))
    blocks, norm = nn.Sequential(*(Block() for _ in range(LAYERS))), nn.LayerNorm(WIDTH)
    parameters = [*embedding.parameters(), positions, *blocks.parameters(), *norm.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    starts = torch.randint(len(text) - TOKENS, (BATCH, 1))
    windows = text[starts + torch.arange(TOKENS + 1)]
    hidden = norm(blocks(embedding(windows[:, :-1]) + positions))
    logits = hidden @ embedding.weight.T
    loss = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    print(f"step 0 loss {loss.item():.4f}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
