"""Triton kernels: one op, one file."""
