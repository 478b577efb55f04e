"""The speculation loop of one generate() call: draft, verify, keep."""
