"""Speed of building a token cache: ours, written to disk, against the libraries used alone.

    python -m benchmarks.tokenising [--json FILE] [--rounds 5] [--text FILE ...]

The text is 16 MB, repeated as often as needed from the files given, else the standard library's
source. Both libraries encode it with GPT-2's vocabulary from memory on all cores by their own batch
calls, and throw the ids away; ours reads it from files as large as given. All take turns, round by
round, so that noise of the machine meets all of them; ratios are of the medians.
"""

import argparse
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from ostro.data.encode import usable_cores
from ostro.data.source import StdlibSource
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer import Gpt2Tokenizer

SIZE = 16_000_000


def texts_of(files: list[Path]) -> list[str]:
    """At least `SIZE` bytes of text."""
    source = StdlibSource()
    texts = [path.read_text(encoding="utf-8") for path in files] or [
        text
        for shard in source.list_shards("train")
        for text in source.read_shard(shard)
        if isinstance(text, str)
    ]
    found, size = [], 0
    for text in itertools.cycle(texts):
        found.append(text)
        size += len(text.encode())
        if size >= SIZE:
            return found
    raise AssertionError("there are texts")


def contenders(texts: list[str], folder: Path) -> dict[str, Callable[[int], object]]:
    """What to call, with the number of the round."""
    for index, text in enumerate(texts):
        (folder / f"{index:05}.txt").write_text(text, encoding="utf-8")
    tokenizer = Gpt2Tokenizer().build()
    fast = tokenizer._tiktoken  # its ranks, with OpenAI's own pattern
    alone = tiktoken.Encoding(
        "alone", pat_str=r50k_pat_str, mergeable_ranks=fast._mergeable_ranks, special_tokens={}
    )
    urls = [str(folder / "*.txt")]

    def build(number: int) -> object:
        config = LMDatasetConfig(train_urls=urls, cache_dir=str(folder / f"cache{number}"))
        return config.build(tokenizer, 1024, 0)

    return {
        "ostro": build,
        "tiktoken": lambda _: alone.encode_ordinary_batch(texts, num_threads=usable_cores()),
        "tokenizers": lambda _: tokenizer.inner.encode_batch_fast(texts),
    }


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 files")
    options = parser.parse_args()
    texts = texts_of(options.text)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    with tempfile.TemporaryDirectory() as folder:
        calls = contenders(texts, Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(options.rounds + 1):
            for name, call in calls.items():
                start = time.perf_counter()
                call(number)
                seconds[name].append(time.perf_counter() - start)
    print(f"{megabytes:.1f} MB in {len(texts)} texts, {usable_cores()} cores")
    ours, results = statistics.median(seconds["ostro"][1:]), {}
    for name, values in seconds.items():
        low, middle, high = min(values[1:]), statistics.median(values[1:]), max(values[1:])
        results[name] = {"seconds": values[1:], "mb_per_s": megabytes / middle}
        print(
            f"{name:10}  {low:5.2f} {middle:5.2f} {high:5.2f} s  {megabytes / middle:5.1f} MB/s"
            f"  ostro is {middle / ours:.2f} times as fast"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
