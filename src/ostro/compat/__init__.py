"""Configurations written for other programs, translated to ours: nanoGPT's and GPT-3 style pairs.

A dialect is a frozen dataclass with its own keys and defaults, and a function that gives the
native settings for them. Nothing here trains anything.
"""
