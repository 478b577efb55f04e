"""Perplexity that a cache costs: `python -m evals.perplexity`."""
