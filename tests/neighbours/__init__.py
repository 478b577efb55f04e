"""Tests beside other libraries: pip install 'hf-kvopt[neighbours]'. A library that is not installed is skipped."""
