"""Look for inputs that crash or hang a reader, guided by branch coverage, for as long as you like.

    pip install atheris coverage
    python tests/fuzz --target yaml --cases 200000

ends at the first mistake and prints the case, which is also kept as `crash-...` in the folder of
`--corpus`. Cases that reached something new are kept there too, and the next start begins with
them. `python tests/fuzz --target yaml --replay` reads them once and prints how much of the reader's
lines and branches they reach.
"""

import argparse
import faulthandler
import json
import logging
import os
import sys
import tempfile
import time
import warnings
from fnmatch import fnmatch
from pathlib import Path
from random import Random

from mutate import mutate

READERS = {
    "yaml": {
        "config.files": "",
        "config.flags": "",
        "config.loading": "load check",
        "config.merge": "",
        "config.nodes": "",
        "config.scalars": "",
    },
    "documents": {"data.files": ""},
    "tokens": {
        "data.text": "_Builder._token_files",
        "data.store": "TokenStore.open TokenStore.largest",
    },
    "ledger": {
        "shapes": "",
        "data.store": "read_json fits _differences _file_differences CacheDir.__init__"
        " CacheDir.fetch CacheDir.finished",
        "data.cache": "CacheRequest open_cache _opened _Writer.__init__ _Writer._holds",
    },
    "manifest": {
        "checkpoint.metadata": "",
        "checkpoint.saved": "Saved read_metadata load",
        "checkpoint.pieces": "Stored whole _box",
    },
    "pt": {
        "checkpoint.single_file": "FileFormat.unpack FileFormat.fits pointed_folder read_file"
        " SavedFile load_file _is_state",
        "dialects.nanogpt_file": "NanoGptFormat.unpack NanoGptFormat.fits _our_weights"
        " _our_optimizer _texts own_settings",
    },
    "safetensors": {"checkpoint.tensorfile": "read_tensors"},
    "alphabet": {"data.meta": "", "data.tokenizer": "tokenizer_from_text"},
}
"""The modules of a reader, and which of their functions read; empty = all."""


def main() -> None:
    """Fuzz one reader, or replay what was found."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--target", required=True, choices=READERS)
    parser.add_argument("--cases", type=int, default=200_000)
    parser.add_argument("--corpus", type=Path, default=Path("fuzz-corpus"))
    parser.add_argument("--replay", action="store_true")
    options = parser.parse_args()
    corpus = options.corpus / options.target
    corpus.mkdir(parents=True, exist_ok=True)
    logging.disable()
    warnings.simplefilter("ignore")
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # cases are written all the time
    with tempfile.TemporaryDirectory(prefix="ostro-fuzz-", dir=memory) as folder:
        work = replay if options.replay else fuzz
        work(options.target, options.cases, corpus, Path(folder))


def fuzz(name: str, num_cases: int, corpus: Path, folder: Path) -> None:
    """Run libFuzzer over a reader; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["ostro"]):
        from readers import SECONDS, TARGETS, limited_memory, speed_up

    speed_up()
    target = TARGETS[name](folder)
    for index, seed in enumerate(target.seeds):
        (corpus / f"seed-{index}").write_bytes(seed)
    started, num_run, num_valid = time.monotonic(), 0, 0

    def one(case: bytes) -> None:
        nonlocal num_run, num_valid
        if num_run % 100 == 0:  # native code hears no signal
            faulthandler.dump_traceback_later(60 + SECONDS, exit=True)
        num_run += 1
        num_valid += target.run(case)
        if num_run == num_cases:
            seconds = time.monotonic() - started
            print(f"{name}: {num_run} cases, {num_valid} of them valid, in {seconds:.0f} s")

    def mutator(case: bytes, max_size: int, seed: int) -> bytes:
        random = Random(seed)
        if random.random() < 0.5:  # valid files are dropped where native code does the reading
            case = random.choice(target.seeds)
        if random.random() < 0.3:
            return atheris.Mutate(case, len(case))
        return mutate(case, random, target.words)[:max_size]

    flags = [f"-runs={num_cases}", f"-artifact_prefix={corpus}/", "-max_len=8192", "-timeout=0",
             "-mutate_depth=1", "-rss_limit_mb=4096", "-verbosity=0"]  # fmt: skip
    atheris.Setup([sys.argv[0], *flags, str(corpus)], one, custom_mutator=mutator)
    with limited_memory():
        atheris.Fuzz()


def replay(name: str, num_cases: int, corpus: Path, folder: Path) -> None:
    """Read seeds and kept cases once, and print the coverage of the reader's modules."""
    import coverage

    measured = coverage.Coverage(data_file=None, branch=True, source=["ostro"])
    measured.start()
    from readers import TARGETS

    target = TARGETS[name](folder)
    cases = [*target.seeds, *(file.read_bytes() for file in sorted(corpus.iterdir()))]
    for case in cases[:num_cases]:
        target.run(case)
    measured.stop()
    print(f"{name}: {len(cases)} cases")
    report = folder / "coverage.json"
    modules = {f"*/ostro/{part.replace('.', '/')}.py": part for part in READERS[name]}
    measured.json_report(include=list(modules), outfile=str(report))
    for path, found in json.loads(report.read_text())["files"].items():
        part = next(part for pattern, part in modules.items() if fnmatch(path, pattern))
        functions = READERS[name][part].split()
        reading = [
            region
            for function, region in found["functions"].items()
            if not functions or function in functions or function.partition(".")[0] in functions
        ]
        sums = [region["summary"] for region in reading]
        done = sum(each["covered_lines"] + each["covered_branches"] for each in sums)
        total = sum(each["num_statements"] + each["num_branches"] for each in sums)
        missing = sorted(line for region in reading for line in region["missing_lines"])
        print(f"  {part}: {100 * done / total:.1f} % of lines and branches, without {missing}")


if __name__ == "__main__":
    main()
