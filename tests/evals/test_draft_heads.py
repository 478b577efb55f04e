"""The shipped draft heads belong to the reference model and are worth their keep."""

import pytest
import torch

import hf_kvopt
from evals.reference_model import MODEL_PATH, heldout_texts, load
from hf_kvopt.speculation.training.features import look
from hf_kvopt.speculation.training.losses import RolledOutLoss, accepted_lengths, walk

FOLDER = MODEL_PATH.parent
# Tokens a step of simulated greedy chains of three; far below what is measured, far above what a broken head gives.
HEADS = {"eagle3": 2.4, "medusa": 1.1}


@pytest.mark.parametrize(("name", "least"), HEADS.items())
@torch.no_grad()
def test_a_shipped_head_drafts_what_the_model_writes(name, least):
    model, tokenizer = load()
    head = hf_kvopt.DraftHead.from_pretrained(FOLDER / name)
    head.check(model)
    prompt = torch.tensor([tokenizer(text)["input_ids"][:96] for text in heldout_texts()[:4]])
    mask = torch.ones_like(prompt)
    rows = model.generate(
        prompt, attention_mask=mask, max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    seen = look(model, head.feature_layers, rows)
    accepted = accepted_lengths(RolledOutLoss(head, 3)(rows, seen), rows, seen.best)
    gains = walk(accepted.tolist(), 96)
    assert sum(gains) / len(gains) > least


def test_the_shipped_heads_are_small():
    sizes = [path.stat().st_size for name in HEADS for path in (FOLDER / name).iterdir()]
    assert sizes
    assert sum(sizes) <= 8e6
