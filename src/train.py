"""Train from GPT-3 style files: python3 src/train.py --config M --training_config T"""

import sys
from pathlib import Path

import ostro  # noqa: F401 - the package beside this file: what follows is found through it

# This folder must not be searched any more: to libraries `import evaluate` means another module.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from ostro.cli.gpt3 import train  # noqa: E402
from ostro.runtime.entry_point import run_script  # noqa: E402

if __name__ == "__main__":
    run_script(train)
