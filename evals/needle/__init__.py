"""Does a model still find, through a cache, what it read long ago? `python -m evals.needle`."""
