"""Does a cache and attention give the tokens that transformers gives? `python -m evals.equality`."""
