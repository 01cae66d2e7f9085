"""`ostro export`: a checkpoint in the layout of another program."""

from ostro.cli.arguments import Parser
from ostro.cli.native import open_checkpoint, saved_config
from ostro.core.redaction import redact
from ostro.models.hf import is_library_tokenizer, write_hf
from ostro.runtime.signals import Signals
from ostro.train_lm import load_tokenizer


def export(argv: list[str], signals: Signals) -> None:
    """`ostro export`: write a checkpoint's model as another program reads it."""
    parser = Parser("export", "Write a checkpoint's model as transformers reads it.", None)
    parser.add_checkpoint()
    parser.add_argument("--to", choices=["hf"], required=True, help="hf: Hugging Face transformers")
    parser.add_argument("--output", metavar="DIR", required=True, help="a folder not there yet")
    options, _ = parser.parse(argv)
    saved = open_checkpoint(options.checkpoint)
    tokenizer = load_tokenizer(saved)
    text = tokenizer.to_text()
    config = saved_config(saved, options).model
    write_hf(options.output, config, saved.tensors("model"), text, tokenizer.eos_id)
    print(f"wrote {redact(str(saved))} to {options.output}")
    if not is_library_tokenizer(text):
        print("without its tokenizer: transformers has none of its kind")
    print(f"load it with: transformers.AutoModelForCausalLM.from_pretrained({options.output!r})")
