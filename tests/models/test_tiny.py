"""The tiny models mean something: tokens are decided by clear margins, and by what attention sees."""

from collections.abc import Callable

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

import hf_kvopt
from hf_kvopt.errors import UnsupportedModel
from tests.models.cases import UNTESTABLE, Case, causal_cases, covered_cases
from tests.models.inputs import inputs_for
from tests.models.reference import generate, reference
from tests.models.shrink import PAD_TOKEN
from tests.models.tiny import NEW_TOKENS, build

MIN_MARGIN = 1e-4
MIN_INFLUENCE = 1e-3
# Models that have no way to leave padding out, so that an attention mask changes nothing.
BLIND_TO_PADDING = {"cpmant", "reformer", "rwkv", "xlm", "xlnet", "xlstm"}


# Positions of a codebook prompt that the model drops before its first forward, with eager attention as well.
NUM_UNREAD = {"musicgen": 10, "musicgen_melody": 1}


def _is_padded(case: Case) -> bool:
    return case.modality not in ("codebooks", "speech")


ALL = pytest.mark.parametrize("case", covered_cases(), ids=lambda case: case.name)


@ALL
def test_tokens_are_decided_by_clear_margins(case: Case) -> None:
    want = reference(case)
    assert want.logits.shape[0] == NEW_TOKENS
    assert want.margin > MIN_MARGIN, "two tokens are nearly tied: give this model another seed in SALTS"


@ALL
def test_the_first_token_of_the_prompt_reaches_the_last_logits(case: Case) -> None:
    def change_first(ids: torch.Tensor) -> torch.Tensor:
        first = (ids != PAD_TOKEN).long().argmax(-1, keepdim=True) + NUM_UNREAD.get(case.name, 0)
        return ids.scatter(-1, first, ids.gather(-1, first) + 1)

    assert _influence(case, "input_ids", change_first).max() > MIN_INFLUENCE


@pytest.mark.parametrize("case", [case for case in covered_cases() if _is_padded(case)], ids=lambda case: case.name)
def test_the_mask_keeps_padding_out(case: Case) -> None:
    moved = _influence(case, "attention_mask", torch.ones_like)[-1]
    if case.name in BLIND_TO_PADDING:
        assert moved == 0
    else:
        assert moved > MIN_INFLUENCE


LISTED = pytest.mark.parametrize(
    "case", [case for case in causal_cases() if case.name in UNTESTABLE], ids=lambda case: case.name
)
_BROKEN = (AttributeError, ImportError, ValueError, StrictDataclassError)


@LISTED
def test_what_is_listed_as_untestable_still_is(case: Case) -> None:
    with pytest.raises(_BROKEN):
        reference(case)


@LISTED
def test_enable_refuses_what_transformers_has_no_cache_for(case: Case) -> None:
    try:
        model = build(case)
    except _BROKEN:
        return
    with pytest.raises(UnsupportedModel, match="keeps its past in a cache of its own, or keeps none"):
        hf_kvopt.enable(model)


def _influence(case: Case, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Change one of the decoder's inputs; return by how much the first logits of each row move."""
    model = build(case)
    inputs = inputs_for(case, model)
    name = f"decoder_{name}" if f"decoder_{name}" in inputs else name
    changed = {**inputs, name: change(inputs[name])}
    before, after = (generate(model, given, max_new_tokens=1).logits[0] for given in (inputs, changed))
    return (before - after).abs().amax(-1)
