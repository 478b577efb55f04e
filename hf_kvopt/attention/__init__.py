"""The attention function that transformers calls, and the masks that it is given."""
