"""The tiny Shakespeare text as characters: data/shakespeare_char/train.bin, val.bin, and the
alphabet in meta.json and, for nanoGPT's own scripts, in meta.pkl.

    python data/shakespeare_char/prepare.py                  # fetches the text, 1.1 MB
    python data/shakespeare_char/prepare.py --text_file my.txt  # offline: that or any other text

The first 90 % are for training, the rest for validation.
"""

import argparse
import json
import pickle
import sys
from pathlib import Path

from ostro.core.errors import DataError
from ostro.data.tokenizer import CharTokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from token_files import cut_in_two, download, read_text, report, run_script, write_token_files

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text_file", type=Path, help="read this text")
    parser.add_argument(
        "--out_dir", type=Path, default=Path(__file__).parent, help="default: %(default)s"
    )
    args = parser.parse_args()
    if args.text_file is None:
        text = download(URL, "--text_file FILE").decode("utf-8")
    else:
        text = read_text(args.text_file, "--text_file")
    if not text:
        raise DataError(f"--text_file = {args.text_file} - is empty - give a text")
    chars = sorted(set(text))
    print(f"{len(text):,} characters, {len(chars)} different ones: {''.join(chars)!r}")
    stoi = {char: index for index, char in enumerate(chars)}
    itos = dict(enumerate(chars))
    beside = {
        "meta.json": json.dumps({"vocab_size": len(chars), "itos": chars, "stoi": stoi}).encode(),
        "meta.pkl": pickle.dumps({"vocab_size": len(chars), "itos": itos, "stoi": stoi}),
    }
    tokenizer = CharTokenizer("".join(chars), eos=False)
    counts = write_token_files(args.out_dir, cut_in_two(text), tokenizer, beside)
    report(
        args.out_dir,
        counts,
        "python train.py config/train_shakespeare_char.py dataset={dataset}",
    )


if __name__ == "__main__":
    run_script(main)
