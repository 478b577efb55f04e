"""The commands of `python -m hf_kvopt`; what they print is made here, what they say is computed elsewhere."""
