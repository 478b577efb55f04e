"""The attention function that transformers calls, and its masks."""
