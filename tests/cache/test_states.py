"""Models with convolution and recurrent states beside keys: rows of beams take their states along."""

import pytest
import torch
from transformers import PreTrainedModel

import hf_kvopt
from tests.models.cases import covered_cases
from tests.models.inputs import inputs_for
from tests.models.tiny import build

pytestmark = pytest.mark.usefixtures("one_thread")
# States in layers of their own, and in the same layers as keys.
CASES = [case for case in covered_cases() if case.name in ("bamba", "falcon_h1", "recurrent_gemma")]


def beams(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model.generate(**inputs, num_beams=3, num_return_sequences=2, max_new_tokens=12)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_beams_take_the_states_of_their_rows_along(case) -> None:
    plain = build(case)
    inputs = inputs_for(case, plain)
    assert torch.equal(beams(hf_kvopt.enable(build(case)), inputs), beams(plain, inputs))
