"""A run of ours against a training loop in plain torch on transformers' GPT-2."""

import pytest
import torch
from tiny_run import read_metrics, write_config
from transformers import GPT2Config, GPT2LMHeadModel

from ostro.cli.arguments import load_run
from ostro.data.loader import Loader
from ostro.models.hf import to_hf
from ostro.train_lm import run
from ostro.trainer import build_state

CHANGES = {
    "model": {"seq_len": 32, "hidden_dim": 32, "num_heads": 4},
    "optimizer": {
        "learning_rate": 0.02,
        "weight_decay": 0.3,
        "max_grad_norm": 0.3,
        "warmup": 3,
        "beta2": 0.98,
    },
    "trainer": {"num_train_steps": 12, "train_batch_size": 6, "per_device_parallelism": 2},
}


def theirs_like(ours: torch.nn.Module) -> GPT2LMHeadModel:
    """transformers' GPT-2 with the weights of ours."""
    config = GPT2Config(
        vocab_size=257, n_positions=32, n_embd=32, n_layer=2, n_head=4,
        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, attn_implementation="eager",
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config)
    weights = to_hf(ours.config, dict(ours.named_parameters()))
    theirs.load_state_dict(weights | {"lm_head.weight": weights["transformer.wte.weight"]})
    return theirs


def test_losses_and_gradient_norms_are_those_of_plain_torch(tmp_path):
    path = write_config(tmp_path, **CHANGES)
    config = load_run(str(path), []).config
    run(config)
    cpu = torch.device("cpu")
    ours = build_state(config.model, config.optimizer, config.trainer, 257, cpu).model
    theirs = theirs_like(ours)

    decay = [p for p in theirs.parameters() if p.ndim == 2]
    embeddings = [theirs.transformer.wte.weight, theirs.transformer.wpe.weight]
    decay = [p for p in decay if all(p is not e for e in embeddings)]
    rest = [p for p in theirs.parameters() if all(p is not d for d in decay)]
    groups = [{"params": decay, "weight_decay": 0.3}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.02, betas=(0.9, 0.98), eps=1e-8)
    rate = config.optimizer.schedule(12)

    tokenizer = config.data.build_tokenizer()
    data = config.data.build(tokenizer, 32, 0)
    losses, norms = {}, {}
    for step, batch in enumerate(
        Loader(data.train, config.trainer.batch_schedule()).batches(range(12))
    ):
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        logits = theirs(batch.tokens).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        norms[step] = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.3).item()
        optimizer.step()
        losses[step] = loss.item()
    assert read_metrics(tmp_path) == pytest.approx(losses, rel=2e-5)
    assert read_metrics(tmp_path, "grad/norm/total") == pytest.approx(norms, rel=1e-3)
    assert max(norms.values()) > 0.3, "clipping was active"
    assert losses[11] < losses[0] - 0.5
