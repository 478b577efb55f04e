"""Storage of keys and values: blocks, who owns them, and how their bytes encode tensors. Torch only."""
