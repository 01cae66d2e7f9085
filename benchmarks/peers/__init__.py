"""Other implementations of the same work, each at its best setting, for comparison."""
