"""Continuous batching: rows join and leave a running batch, one packed forward a step."""
