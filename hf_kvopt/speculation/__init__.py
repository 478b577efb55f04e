"""Speculation: drafters propose tokens, one loop verifies them with the target."""
