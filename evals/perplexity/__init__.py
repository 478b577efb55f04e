"""What does a cache cost in perplexity? `python -m evals.perplexity`."""
