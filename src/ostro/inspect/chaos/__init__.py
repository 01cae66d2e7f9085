"""Runs that are killed on purpose, and what must be true of what they leave."""
