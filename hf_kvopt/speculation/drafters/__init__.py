"""Drafters without trained heads: an assistant model, lookahead decoding, prompt lookup."""
