"""OpenWebText as GPT-2 tokens: data/openwebtext/train.bin (9 billion tokens, 17 GB) and val.bin.

    python data/openwebtext/prepare.py                       # from the Hugging Face hub
    python data/openwebtext/prepare.py --dataset_dir my_copy # offline: a folder of the same layout

A folder of that layout holds parquet or JSON lines files with a column `text`. One document in
2,000, drawn with nanoGPT's seed, is for validation; every document ends with the end of text.
Needs `pip install "ostro[gpt2,hf]"`, and 54 GB in the Hugging Face cache for the whole data set.
"""

import argparse
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ostro.core.errors import DataError
from ostro.data.tokenizer_config import Gpt2Tokenizer

sys.path.insert(0, str(Path(__file__).parents[1]))
from token_files import Document, report, run_script, write_token_files

HUB_NAME = "Skylion007/openwebtext"
OFFLINE = "give a copy of the data set with --dataset_dir DIR"


def load(dataset_dir: Path | None) -> Any:
    """The data set as one table, mapped from disk."""
    try:
        import datasets
    except ImportError as error:
        raise DataError('the datasets library is missing - pip install "ostro[hf]"') from error
    if dataset_dir is not None and not dataset_dir.is_dir():
        raise DataError(f"--dataset_dir = {dataset_dir} - is no folder - correct the path")
    name = HUB_NAME if dataset_dir is None else str(dataset_dir.resolve())
    print(f"opening {name}", flush=True)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # six lines for no network
    try:
        return datasets.load_dataset(name, split="train")
    except Exception as error:  # the library raises a dozen unrelated classes here
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        setting = HUB_NAME if dataset_dir is None else f"--dataset_dir = {dataset_dir}"
        advice = f"check the network, or {OFFLINE}" if dataset_dir is None else "mend the folder"
        raise DataError(f"{setting} - cannot be opened: {reason} - {advice}") from error


def documents(rows: Any) -> Iterator[Document]:
    """Validation first, so that a mistake shows before hours of work."""
    if "text" not in rows.column_names or len(rows) < 2:
        raise DataError(
            f"--dataset_dir - has {len(rows)} rows with {', '.join(rows.column_names)} - "
            "it takes at least two, with a column text"
        )
    parts = rows.train_test_split(test_size=0.0005, seed=2357, shuffle=True)
    for split, part in (("val", parts["test"]), ("train", parts["train"])):
        for batch in part.iter(batch_size=1000):
            for text in batch["text"]:
                yield split, text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_dir", type=Path, help="read this folder instead of the hub")
    parser.add_argument(
        "--out_dir", type=Path, default=Path(__file__).parent, help="default: %(default)s"
    )
    args = parser.parse_args()
    rows = load(args.dataset_dir)
    counts = write_token_files(args.out_dir, documents(rows), Gpt2Tokenizer().build())
    report(args.out_dir, counts, "python train.py dataset={dataset}")


if __name__ == "__main__":
    run_script(main)
