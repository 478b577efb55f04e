"""Losses of eviction policies, by the memory that they hold."""
