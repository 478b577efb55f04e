"""Draft, verify, keep: one generate() call."""
