"""A small real language model of Python source, so that quality can be measured offline.

`load()` gives model and tokenizer; `heldout_texts()` the modules that neither has ever seen.
"""

from evals.reference_model.paths import HELDOUT_PATH, MODEL_PATH, heldout_texts, load

__all__ = ["HELDOUT_PATH", "MODEL_PATH", "heldout_texts", "load"]
