"""Looking at runs: what one would do, whether it resumes bit for bit, what a batch held."""
