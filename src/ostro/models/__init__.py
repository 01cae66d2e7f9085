"""Model families: one file each, registered by name in `LmConfig`."""

from ostro.models.gpt2 import Gpt2Config
from ostro.models.llama import LlamaConfig
from ostro.models.lm_model import LmConfig, LmModel, initialize
