"""Command lines: argv, environment and files become a configuration, and nothing else."""
