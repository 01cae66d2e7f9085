"""How good a model is: losses and bits per byte, and benchmarks of lm-evaluation-harness."""
