"""All evals on one page: `python -m evals.report`."""
