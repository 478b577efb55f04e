"""Time to first token with and without shared prefixes."""
