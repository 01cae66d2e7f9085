"""Sample from a checkpoint with nanoGPT's settings: python sample.py start="Once" num_samples=3"""

import sys

from ostro.cli.nanogpt_sample import sample
from ostro.guard import guarded

if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--debug"]
    sys.exit(guarded(lambda signals: sample(words, signals), debug="--debug" in sys.argv))
