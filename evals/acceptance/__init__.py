"""Speculation: accepted tokens of a step, and the speed-up they give."""
