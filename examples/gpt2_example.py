"""Train a GPT-2 from a configuration file:

python examples/gpt2_example.py --config_path config/gpt2_small.yaml --model.num_layers 6
"""

import sys

from ostro.cli.main import main

if __name__ == "__main__":
    sys.argv.insert(1, "train")
    main()
