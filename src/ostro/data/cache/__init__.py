"""Documents as tokens on the disk: building a cache, and what it is known by."""
