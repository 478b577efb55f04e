"""Weights that torchao and quanto quantize: equal tokens to the same model without hf_kvopt."""

import copy
from typing import Any

import pytest
import torch

from tests.helpers import tiny_model
from tests.neighbours.options import check

pytestmark = pytest.mark.usefixtures("one_thread")


def torchao(model: Any, name: str) -> None:
    library = pytest.importorskip("torchao.quantization", reason="pip install 'hf-kvopt[neighbours]'")
    int4 = {"weight_dtype": torch.int4, "granularity": library.PerAxis(0)}
    config = library.Int8WeightOnlyConfig() if name == "int8" else library.IntxWeightOnlyConfig(**int4)
    library.quantize_(model, config)


def quanto(model: Any, name: str) -> None:
    library = pytest.importorskip("optimum.quanto", reason="pip install 'hf-kvopt[neighbours]'")
    library.quantize(model, weights=getattr(library, name), exclude="lm_head")
    library.freeze(model)


@pytest.mark.parametrize("how", ["torchao int8", "torchao int4", "quanto qint8"])
def test_quantized_weights_give_equal_tokens_under_everything(how: str) -> None:
    model = copy.deepcopy(tiny_model("full", "eager"))
    before = model(torch.tensor([[5, 6, 7]])).logits
    library, name = how.split()
    {"torchao": torchao, "quanto": quanto}[library](model, name)
    assert not torch.equal(model(torch.tensor([[5, 6, 7]])).logits, before)
    check(model)
