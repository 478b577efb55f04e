"""Reference of every kernel, in float32 torch."""
