"""Paths of the bundled model and of the held-out text, and their loaders."""

import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

MODEL_PATH = Path(__file__).parent / "model"
HELDOUT_PATH = Path(__file__).parent / "heldout.jsonl"


def load(dtype: torch.dtype = torch.float32, **model_kwargs: object) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load the reference model, in eval mode, and its tokenizer; extra arguments go to `from_pretrained`."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL_PATH)
    model = AutoModelForCausalLM.from_pretrained(MODEL_PATH, dtype=dtype, **model_kwargs)
    return model.eval(), tokenizer


def heldout_texts() -> list[str]:
    """Read the held-out modules, one string per file, in the order of their names.

    It loads as a data set too: `load_dataset("json", data_files=str(HELDOUT_PATH))`.
    """
    with HELDOUT_PATH.open(encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]
