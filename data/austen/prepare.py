"""Six novels by Jane Austen as GPT-2 tokens: data/austen/train.bin and val.bin.

    python data/austen/prepare.py                       # from Project Gutenberg
    python data/austen/prepare.py --text_dir my_texts   # offline: every *.txt file of a folder

The first 90 % of each book are for training, the rest for validation; each part ends with the end
of text, so that no part seems to go on with the next one.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from ostro.core.errors import DataError
from ostro.data.tokenizer_config import Gpt2Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from token_files import (
    cut_in_two,
    download,
    read_text,
    report,
    run_script,
    write_token_files,
)

BOOKS = {
    "Emma": 158,
    "Mansfield Park": 141,
    "Northanger Abbey": 121,
    "Persuasion": 105,
    "Pride and Prejudice": 1342,
    "Sense and Sensibility": 161,
}
URL = "https://www.gutenberg.org/cache/epub/{0}/pg{0}.txt"
_MARK = r"\*\*\* ?{} (?:THE|THIS) PROJECT GUTENBERG EBOOK.*?\*\*\*"
_START = re.compile(_MARK.format("START OF"), re.DOTALL | re.IGNORECASE)
_END = re.compile(_MARK.format("END OF"), re.DOTALL | re.IGNORECASE)


def book(text: str) -> str:
    """The book itself, without what Project Gutenberg puts around it."""
    start, end = _START.search(text), _END.search(text)
    return text[start.end() if start else 0 : end.start() if end else None].strip() + "\n"


def fetched() -> Iterator[str]:
    for title, number in BOOKS.items():
        print(f"fetching {title}", flush=True)
        data = download(URL.format(number), "--text_dir DIR, a folder of .txt files")
        yield data.decode("utf-8-sig").replace("\r\n", "\n")


def from_folder(folder: Path) -> Iterator[str]:
    paths = sorted(folder.glob("*.txt"))
    if not paths:
        raise DataError(f"--text_dir = {folder} - holds no .txt file - name a folder that does")
    for path in paths:
        yield read_text(path, "--text_dir")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text_dir", type=Path, help="read the *.txt files of this folder")
    parser.add_argument(
        "--out_dir", type=Path, default=Path(__file__).parent, help="default: %(default)s"
    )
    args = parser.parse_args()
    texts = fetched() if args.text_dir is None else from_folder(args.text_dir)
    documents = (part for text in texts for part in cut_in_two(book(text)))
    counts = write_token_files(args.out_dir, documents, Gpt2Tokenizer().build())
    report(
        args.out_dir,
        counts,
        "python train.py dataset={dataset} max_iters=2000 lr_decay_iters=2000 warmup_iters=100 "
        "eval_interval=100 gradient_accumulation_steps=8 dropout=0.2",
    )


if __name__ == "__main__":
    run_script(main)
