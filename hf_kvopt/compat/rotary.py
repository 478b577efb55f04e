"""The rotary embedding of a model, found in the modeling file of its attention module."""

import inspect
import sys
from collections.abc import Callable

import torch
from torch import Tensor, nn

Rotation = Callable[[Tensor, Tensor, bool], Tensor]
"""Takes states [heads, n, head_dim], positions [n], and whether to turn back."""


def rotation_of(module: nn.Module) -> Rotation | None:
    """Return what rotates states of an attention module; None where its modeling file has no such function."""
    modeling = sys.modules[type(module).__module__]
    apply = getattr(modeling, "apply_rotary_pos_emb", None)
    embeddings = [
        value
        for name, value in vars(modeling).items()
        if name.endswith("RotaryEmbedding") and isinstance(value, type) and value.__module__ == modeling.__name__
    ]
    config = getattr(module, "config", None)
    if apply is None or len(embeddings) != 1 or config is None:
        return None
    embedding, extras = embeddings[0](config), {}
    if "layer_type" in inspect.signature(embedding.forward).parameters:  # windows rotate by other frequencies
        extras["layer_type"] = config.layer_types[module.layer_idx]

    @torch.no_grad()
    def rotate(states: Tensor, positions: Tensor, back: bool) -> Tensor:
        cos, sin = embedding.to(states.device)(states, positions[None].to(states.device), **extras)
        if back:
            size = cos.square() + sin.square()  # of an embedding that scales as well
            cos, sin = cos / size, -sin / size
        width = cos.shape[-1]
        # Models that rotate a part of each head cut it off before they call this, or inside of it.
        part, rest = states[None, ..., :width], states[None, ..., width:]
        turned: Tensor = torch.cat([apply(part, part, cos, sin)[0], rest], dim=-1)[0]
        return turned

    return rotate
