"""Your own text as GPT-2 tokens: data/processed/train.bin and val.bin, which the training files
under configs/training_configs/ read.

    python data/processed/prepare.py --input "raw/*.jsonl.gz" "more/{1..8}.txt"
    python data/processed/prepare.py                     # for a try: Python's own source code

Files may be text, JSON lines, JSON or parquet, plain or as .gz or .zst. Of a file of many documents
every n-th goes to validation, of a text file its end; every document ends with the end of text.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from ostro.core.errors import DataError
from ostro.data.sources.files import BadRecord
from ostro.data.sources.source import StdlibSource, UrlsSource
from ostro.data.tokenizer_config import Gpt2Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from token_files import Document, cut_in_two, report, run_script, write_token_files


def from_files(source: UrlsSource, val_fraction: float) -> Iterator[Document]:
    count = 0
    for shard in source.list_shards("train"):
        for record in source.read_shard(shard):
            if isinstance(record, BadRecord):
                raise DataError(f"{record} - mend the record, or set --text_key or --format")
            if shard.format == "text":
                yield from cut_in_two(record, val_fraction)
                continue
            count += 1
            held_out = int(count * val_fraction) > int((count - 1) * val_fraction)
            yield "val" if held_out else "train", record


def from_stdlib() -> Iterator[Document]:
    source = StdlibSource()
    for split, name in (("val", "validation"), ("train", "train")):
        for shard in source.list_shards(name):
            for record in source.read_shard(shard):
                if not isinstance(record, BadRecord):  # not a mistake that a user can mend
                    yield split, record


def fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} - must lie between 0 and 1")
    return value


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    texts = parser.add_mutually_exclusive_group()
    texts.add_argument("--input", nargs="+", metavar="FILE", help="paths, globs or URLs")
    texts.add_argument(
        "--source", choices=["stdlib"], help="a text that is always there; the default"
    )
    parser.add_argument(
        "--val_fraction", type=fraction, default=0.01, help="of --input; default: %(default)s"
    )
    parser.add_argument("--text_key", default="text", help="key or column that holds the text")
    parser.add_argument(
        "--format", default="auto", choices=["auto", "text", "jsonl", "json", "parquet"]
    )
    parser.add_argument(
        "--out_dir", type=Path, default=Path(__file__).parent, help="default: %(default)s"
    )
    args = parser.parse_args()
    if args.input is None:
        if args.source is None:
            print("no --input: taking the source code of Python's standard library", flush=True)
        documents = from_stdlib()
    else:
        source = UrlsSource(args.input, text_key=args.text_key, format=args.format)
        documents = from_files(source, args.val_fraction)
    counts = write_token_files(args.out_dir, documents, Gpt2Tokenizer().build())
    report(
        args.out_dir,
        counts,
        "python3 src/train.py --config configs/model_configs/125M.yaml "
        "--training_config configs/training_configs/small_scale.yaml",
    )


if __name__ == "__main__":
    run_script(main)
