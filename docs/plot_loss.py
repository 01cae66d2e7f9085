"""Draw the loss curve of a run from its metrics.jsonl:

python docs/plot_loss.py logs/<run id>/metrics.jsonl docs/images/quickstart-loss.png
"""

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(metrics: Path, image: Path) -> None:
    """Training loss of every step and the evaluations, against tokens seen where logged."""
    events = [json.loads(line) for line in metrics.read_text().splitlines()]
    train = [(e["step"], e["train/loss"]) for e in events if "train/loss" in e]
    evaluated = [(e["step"], e["eval/loss"]) for e in events if "eval/loss" in e]
    figure, axes = pyplot.subplots(figsize=(8, 4))
    axes.plot(*zip(*train, strict=True), linewidth=0.8, label="training loss")
    axes.plot(*zip(*evaluated, strict=True), "o-", label="validation loss")
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(image, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
