"""What transformers generates by itself, the measure of everything else."""

from functools import cache
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from tests.models.cases import Case
from tests.models.inputs import Inputs, inputs_for
from tests.models.tiny import build


class Generated(NamedTuple):
    tokens: torch.Tensor  # [batch, prompt + new]
    logits: torch.Tensor  # [new, batch, vocab]

    @property
    def margin(self) -> float:
        """The smallest distance between the chosen token and the next best one."""
        best = self.logits.topk(2).values
        return float((best[..., 0] - best[..., 1]).min())


@torch.no_grad()
def generate(model: PreTrainedModel, inputs: Inputs, **kwargs: object) -> Generated:
    """Generate greedily, and keep the logits of every step."""
    out = model.generate(**inputs, return_dict_in_generate=True, output_logits=True, **kwargs)
    return Generated(out.sequences, torch.stack(out.logits).float())


@cache
def reference(case: Case) -> Generated:
    """Generate with eager attention and the cache that transformers makes for the model."""
    model = build(case, "eager")
    return generate(model, inputs_for(case, model))
