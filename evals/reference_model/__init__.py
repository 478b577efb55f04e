"""A small real language model of Python source, so that quality can be measured offline.

`load()` returns model and tokenizer; `heldout_texts()` the modules that neither was trained on.
"""

from evals.reference_model.paths import HELDOUT_PATH, MODEL_PATH, heldout_texts, load

__all__ = ["HELDOUT_PATH", "MODEL_PATH", "heldout_texts", "load"]
