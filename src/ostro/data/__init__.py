"""Data: text files in, training examples out; the batch of a step is a pure function of it.

`text.LMDatasetConfig` is the way in. This package imports nothing by itself, as the processes that
tokenise need no torch.
"""
