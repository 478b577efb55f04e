"""Attention over blocks on a CPU, compiled at first use through llvmlite, the code generator of Numba."""
