"""Train from nanoGPT-style settings: python train.py batch_size=32 compile=False"""

from ostro.cli.nanogpt import train
from ostro.runtime.entry_point import run_script

if __name__ == "__main__":
    run_script(train)
