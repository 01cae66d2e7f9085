"""Look for inputs that crash or hang a reader, guided by branch coverage, for as long as you like.

    pip install atheris coverage
    python tests/fuzz --target yaml --cases 200000

ends at the first mistake and prints the case, which is also kept as `crash-...` in the folder of
`--corpus`. Cases that reached something new are kept there too, and the next start begins with
them. `python tests/fuzz --target yaml --replay` reads them once and prints the branch coverage of
the reader's modules.
"""

import argparse
import faulthandler
import logging
import os
import sys
import tempfile
import time
import warnings
from pathlib import Path
from random import Random

from mutate import mutate

MODULES = {
    "yaml": "config.files config.nodes config.scalars config.merge config.flags config.loading",
    "documents": "data.files",
    "tokens": "data.text data.store",
    "ledger": "data.store data.cache",
    "manifest": "checkpoint.metadata checkpoint.store checkpoint.pieces",
    "pt": "checkpoint.single_file dialects.nanogpt_file",
    "safetensors": "checkpoint.tensorfile",
    "alphabet": "data.meta data.tokenizer",
}


def main() -> None:
    """Fuzz one reader, or replay what was found."""
    parser = argparse.ArgumentParser(prog="python tests/fuzz", description=__doc__)
    parser.add_argument("--target", required=True, choices=MODULES)
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
    from readers import TARGETS, speed_up

    speed_up()
    target = TARGETS[name](folder)
    cases = [*target.seeds, *(file.read_bytes() for file in sorted(corpus.iterdir()))]
    for case in cases[:num_cases]:
        target.run(case)
    measured.stop()
    print(f"{name}: {len(cases)} cases")
    modules = [f"*/ostro/{part.replace('.', '/')}.py" for part in MODULES[name].split()]
    measured.report(include=modules, show_missing=True)


if __name__ == "__main__":
    main()
