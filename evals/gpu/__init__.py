"""Everything on a CUDA machine, in one call."""
