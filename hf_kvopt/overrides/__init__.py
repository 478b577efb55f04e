"""Overrides: everything that replaces a method on one model instance."""
