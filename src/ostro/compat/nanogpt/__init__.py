"""nanoGPT: its settings and its checkpoint file."""
