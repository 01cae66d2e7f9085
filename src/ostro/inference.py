"""A trained model out of a checkpoint: to sample from, to evaluate."""

import torch

from ostro.checkpoint import Saved, SavedFile
from ostro.core.errors import CheckpointError
from ostro.data.tokenizer import Tokenizer, tokenizer_from_text
from ostro.lm_config import TrainLmConfig, vocab_size
from ostro.models.lm_model import LmModel
from ostro.trainer.state import load_weights


def load_tokenizer(saved: Saved | SavedFile) -> Tokenizer:
    """The tokenizer that was saved with the checkpoint."""
    text = saved.texts.get("tokenizer.json")
    if text is None:
        raise CheckpointError(f"{saved.path} holds no tokenizer.json - save it with ostro train")
    eos_id = saved.values.get("eos_id")
    return tokenizer_from_text(text, eos_id, f"{saved.path}/tokenizer.json")


def load_model(
    saved: Saved | SavedFile, config: TrainLmConfig, tokenizer: Tokenizer, device: torch.device
) -> LmModel:
    """The model of `config` with the checkpoint's weights, in evaluation mode."""
    compute_dtype = getattr(torch, config.trainer.mp.compute)
    with torch.device(device):
        model = config.model.build(vocab_size(config, tokenizer), compute_dtype=compute_dtype)
    load_weights(model, saved.tensors("model"), str(saved.path))
    return model.eval()
