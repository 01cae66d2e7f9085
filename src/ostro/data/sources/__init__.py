"""Where documents come from: files, data sets of the hub, token files, and how they are read."""
