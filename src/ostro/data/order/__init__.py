"""Which examples make up a batch: index arithmetic, without files."""
