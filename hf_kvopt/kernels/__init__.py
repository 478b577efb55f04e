"""Attention and storage kernels: Triton on a GPU, plain torch on a CPU."""
