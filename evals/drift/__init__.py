"""Do the errors of a cache add up over a long answer? `python -m evals.drift`."""
