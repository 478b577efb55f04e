"""Everything that replaces a method on one model instance."""
