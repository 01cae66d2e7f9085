"""Train from nanoGPT-style settings: python train.py batch_size=32 compile=False"""

import sys

from ostro.cli.nanogpt import train
from ostro.guard import guarded

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--debug"]
    sys.exit(guarded(lambda signals: train(words, signals), debug="--debug" in sys.argv))
