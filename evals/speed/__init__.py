"""Time of a prefill, a decode step and a whole generate(): `python -m evals.speed`."""
