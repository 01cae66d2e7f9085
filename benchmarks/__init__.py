"""Measurements of speed and memory, each runnable alone: `python -m benchmarks.train_step`."""
