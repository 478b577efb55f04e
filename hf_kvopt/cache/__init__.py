"""Caches that a user passes to `generate`."""
