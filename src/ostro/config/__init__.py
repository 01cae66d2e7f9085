"""Configuration: files, flags and defaults become one tree whose leaves know their origin."""

from ostro.config.choice import Choice

__all__ = ["Choice"]
