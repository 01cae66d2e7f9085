"""GPT-3-style pairs of YAML files."""
