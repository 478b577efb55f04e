"""Correctness and speed of everything on a CUDA machine, in one call."""
