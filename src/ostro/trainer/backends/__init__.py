"""What computes the gradients and the update: torch, DeepSpeed, or bit for bit for any split."""
