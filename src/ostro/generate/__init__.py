"""Text from a model: sampling with a cache of keys and values, and a decoder for CPUs."""
