"""Tests of offline batched inference."""
