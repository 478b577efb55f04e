"""Policies that say which tokens a bounded cache keeps; they know lengths, and nothing of blocks or models."""
