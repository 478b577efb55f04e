"""Continuous batching under load; see `__main__`."""
