"""Scores of a checkpoint on benchmarks:

python src/evaluate.py --model_checkpoint C --config configs/model_configs/125M.yaml \\
    --benchmark superglue lambada triviaqa piqa
"""

import sys
from pathlib import Path

import ostro  # noqa: F401 - the package beside this file: what follows is found through it

# This folder must not be searched any more: to libraries `import evaluate` means another module.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from ostro.cli.gpt3_tools import evaluate  # noqa: E402
from ostro.runtime.entry_point import run_script  # noqa: E402

if __name__ == "__main__":
    run_script(evaluate)
