"""What every kernel computes, in float32 torch."""
