"""Capacity of a fixed pool of KV memory under several allocation strategies."""
