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
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from benchmarks import common
from ostro.data.sources.source import StdlibSource
from ostro.data.text import LMDatasetConfig
from ostro.data.tokenizer_config import Gpt2Tokenizer

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
        "tiktoken": lambda _: alone.encode_ordinary_batch(texts, num_threads=common.usable_cores()),
        "tokenizers": lambda _: tokenizer.inner.encode_batch_fast(texts),
    }


def measure(rounds: int, files: Sequence[Path] = ()) -> dict[str, Any]:
    """Interleaved rounds of all; the first one warms up."""
    texts = texts_of(list(files))
    with tempfile.TemporaryDirectory() as folder:
        calls = contenders(texts, Path(folder))
        numbers = iter(itertools.count())

        def timed(call: Callable[[int], object]) -> float:
            start = time.perf_counter()
            call(next(numbers))
            return time.perf_counter() - start

        seconds = common.take_turns(
            {name: lambda call=call: timed(call) for name, call in calls.items()}, rounds + 1
        )
    kept = {name: values[1:] for name, values in seconds.items()}
    alone = [name for name in kept if name != "ostro"]
    return {
        "megabytes": sum(len(text.encode()) for text in texts) / 1e6,
        "num_texts": len(texts),
        "cores": common.usable_cores(),
        "seconds": {name: common.spread(values) for name, values in kept.items()},
        "ratio": {name: common.paired_ratio(kept[name], kept["ostro"]) for name in alone},
    }


def show(result: dict[str, Any]) -> str:
    """A row for each contender."""
    size, rows = result["megabytes"], []
    for name, seconds in result["seconds"].items():
        ratio = result["ratio"].get(name)
        times = common.figure(ratio, digits=2) if ratio else ""
        rate = f"{size / seconds['median']:.1f}"
        rows.append([name, common.figure(seconds, digits=2), rate, times])
    about = f"{size:.1f} MB in {result['num_texts']} texts, {result['cores']} cores:"
    header = ["", "seconds", "MB/s", "ostro is so many times as fast"]
    return f"{about}\n\n{common.table(header, rows)}"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--text", type=Path, nargs="+", default=[], help="UTF-8 files")
    options = parser.parse_args()
    result = measure(options.rounds, options.text)
    print(show(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
