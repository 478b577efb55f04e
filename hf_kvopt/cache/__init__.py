"""Caches that a user passes as `past_key_values`."""
