"""Prompts whose keys and values outlive a call."""
