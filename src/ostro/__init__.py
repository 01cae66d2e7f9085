"""ostro: pre-train GPT-style language models from configuration alone."""

__version__ = "0.1.0"
