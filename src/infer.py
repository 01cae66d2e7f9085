"""Text from a checkpoint:

python src/infer.py --model_checkpoint C --config configs/model_configs/125M.yaml \\
    --prompt "Once upon a time" --max_length 100 --temperature 0.7 --top_p 0.8
"""

import sys
from pathlib import Path

import ostro  # noqa: F401 - the package beside this file: what follows is found through it

# This folder must not be searched any more: to libraries `import evaluate` means another module.
sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]

from ostro.cli.gpt3_tools import infer  # noqa: E402
from ostro.runtime.entry_point import run_script  # noqa: E402

if __name__ == "__main__":
    run_script(infer)
