"""Sample from a checkpoint with nanoGPT's settings: python sample.py start="Once" num_samples=3"""

from ostro.cli.nanogpt_sample import sample
from ostro.runtime.entry_point import run_script

if __name__ == "__main__":
    run_script(sample)
