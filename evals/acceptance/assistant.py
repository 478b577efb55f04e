"""Assistant for a model without a smaller sibling: some of its own layers, untrained.

Source: Zhang et al., "Draft & Verify", arXiv:2309.08168, which searches for the layers; here they are evenly spaced.
"""

import copy
from typing import Any, NamedTuple

from torch import nn


class Assistant(NamedTuple):
    """A model that drafts, with its description."""

    model: Any
    what: str


def of_own_layers(target: Any, num_layers: int) -> Assistant:
    """Copy a Llama-like `target` with `num_layers` of its layers, the first and the last among them."""
    num_all = target.config.num_hidden_layers
    chosen = [round(i * (num_all - 1) / (num_layers - 1)) for i in range(num_layers)]
    model = copy.deepcopy(target)
    model.model.layers = nn.ModuleList([model.model.layers[i] for i in chosen])
    for idx, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = idx
    model.config.num_hidden_layers = num_layers
    return Assistant(model, f"layers {' '.join(map(str, chosen))} of the target's {num_all}, untrained")
