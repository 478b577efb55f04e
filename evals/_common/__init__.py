"""Shared parts of all evals: command line, model, prompts, sides, clock, memory, rows, screen."""
