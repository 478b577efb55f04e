"""Where keys and values live: blocks, who owns them, and how their bytes encode tensors. Torch only."""
