"""What eviction policies lose, by the memory that they hold."""
