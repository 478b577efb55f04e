"""Measurements of hf_kvopt: every number is reproducible with `python -m evals.<name>`."""
