"""Commands of `python -m hf_kvopt`: they format and print what other modules compute."""
