"""Attention, storing and drafting on a CPU, compiled where it can be."""
