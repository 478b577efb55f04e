"""Offline batched inference: completions for the rows of a file or a dataset, by continuous batching, resumable."""
