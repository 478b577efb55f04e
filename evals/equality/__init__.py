"""Equality of tokens and logits with transformers: `python -m evals.equality`."""
