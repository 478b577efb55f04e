"""Tiers below the device for known texts: memory of the host, and files on a disk."""
