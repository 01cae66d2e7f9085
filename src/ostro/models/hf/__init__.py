"""Weights as Hugging Face keeps them: read from a folder or the hub, written for transformers."""

from ostro.models.hf.files import (
    is_library_tokenizer,
    read_hf,
    read_model,
    read_settings,
    read_weights,
    write_hf,
)
from ostro.models.hf.layout import HfParameter, from_hf, gpt2_parameters, to_hf
from ostro.models.hf.settings import hf_config, lm_config
