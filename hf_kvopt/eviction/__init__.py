"""Which tokens a bounded cache keeps: policies that know lengths and scores, and nothing of blocks or models."""
