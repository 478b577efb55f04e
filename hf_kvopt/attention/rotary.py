"""Rotation of states to positions, and back, with the functions of the model that an attention module belongs to."""

import torch
from torch import Tensor, nn

from hf_kvopt import compat
from hf_kvopt.errors import UnsupportedModel

_SAME = 1e-3  # what rounding may leave of a rotation and its inverse, as a share of the largest value


def turn(
    module: nn.Module,
    states: Tensor,  # [heads, n, head_dim]
    positions: Tensor,  # [n]
    back: bool = False,
) -> Tensor:  # [heads, n, head_dim] float32
    """Rotate states to positions as the model of `module` does, or back from there.

    Raises:
        UnsupportedModel: the model has no rotary embedding that can be found, or one that this does not invert.
    """
    rotate = compat.rotation_of(module)
    if rotate is None:
        raise UnsupportedModel(
            f"this policy scores keys by where future queries will stand: got {type(module).__name__}, of which no "
            "rotary embedding was found; use SnapKV, or another policy that goes by what was seen"
        )
    turned = rotate(states.float(), positions, back)
    if not torch.allclose(rotate(turned, positions, not back), states.float(), atol=_SAME * float(states.abs().max())):
        raise UnsupportedModel(
            f"this policy turns queries back to where they were before their rotation: got {type(module).__name__}, "
            "whose rotation is another one than its modeling file names; use SnapKV"
        )
    return turned
