"""Speculation: tokens accepted a step, and what they are worth."""
