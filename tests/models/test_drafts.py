"""Every model speculates to exactly the tokens of plain decoding, or refuses to with one clear error."""

import pytest
import torch

from hf_kvopt import KVOptError, speculative
from tests.models import expected
from tests.models.cases import Case, covered_cases
from tests.models.inputs import inputs_for
from tests.models.kinds import layer_kinds
from tests.models.reference import reference
from tests.models.tiny import build
from tests.speculation.drafters import Forest, Oracle

# Kinds of layers whose past can be taken back token by token.
TAKEN_BACK = {"full", "sliding", "chunked", "latents", "none", "states", "full with states", "sliding with states"}
TEXTS = [case for case in covered_cases() if case.modality in ("text", "image")]
REFUSED = [case for case in TEXTS if case.name in expected.NOT_DRAFTED or not set(layer_kinds(case)) <= TAKEN_BACK]
DRAFTED = [case for case in TEXTS if case not in REFUSED]


@pytest.mark.parametrize("case", DRAFTED, ids=lambda case: case.name)
def test_rows_that_go_on_by_themselves_give_the_eager_tokens(case: Case) -> None:
    model, wanted = build(case), reference(case).tokens
    spec = speculative(Oracle(wanted), gamma=4, fallback=False)
    assert torch.equal(model.generate(**inputs_for(case, model), custom_generate=spec), wanted)
    assert spec.stats.steps > 0


@pytest.mark.parametrize("case", DRAFTED, ids=lambda case: case.name)
def test_trees_behind_padding_give_the_eager_tokens(case: Case) -> None:
    model, wanted = build(case), reference(case).tokens[1:]
    spec = speculative(Forest(wanted, wrong_at=(wanted.shape[1] - 5,)), gamma=4, num_nodes=12, fallback=False)
    inputs = {name: value[1:] for name, value in inputs_for(case, model).items()}
    assert torch.equal(model.generate(**inputs, custom_generate=spec), wanted)
    assert spec.stats.steps > 0


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_what_cannot_be_taken_back_is_refused(case: Case) -> None:
    model = build(case)
    with pytest.raises(KVOptError, match="speculation"):
        model.generate(**inputs_for(case, model), custom_generate=speculative("lookahead", fallback=False))
