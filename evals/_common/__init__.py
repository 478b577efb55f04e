"""What every eval shares: command line, model, prompts, sides, clock, memory, rows, screen."""
