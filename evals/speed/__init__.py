"""What do a prefill, a decode step and a whole generate() cost? `python -m evals.speed`."""
