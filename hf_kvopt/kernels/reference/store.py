"""New keys and values into their slots in plain torch, on any device: what the other writers are held to.

pool[slot, head] = quantize(guard(states[row, head, token]))        slot -1: skipped
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hf_kvopt.kernels.blocks import scatter, strided
from hf_kvopt.kernels.calls import PlaneWrite, StoreCall
from hf_kvopt.quant import SCALE_DTYPE, Quantized, guarded, quantize

# Elements up to which quantizing keys and values in one pass, copied together, costs less.
_ONE_PASS = 1 << 16


def accepts(call: StoreCall) -> bool:
    """Take every call."""
    return True


def run(call: StoreCall) -> None:
    """Guard, quantize and write the states of each plane."""
    slots = None if call.even is not None else call.slots().reshape(-1)
    for part, encoded in zip(call.parts, _encoded(call.parts), strict=True):
        for held, new in zip(part.plane.tensors, encoded.parts, strict=True):
            if call.even is not None:
                batch, _, tokens = new.shape[:3]
                strided(held, *call.even, batch, tokens).copy_(new)
            else:
                assert slots is not None
                scatter(held, slots, new)


def _encoded(parts: Sequence[PlaneWrite]) -> list[Quantized]:
    """Return states as they are stored; in one pass where keys and values are stored alike."""
    states = [guarded(part.states, part.plane.rotates, part.centre) for part in parts]
    formats = [part.format for part in parts]
    is_one_pass = len(parts) == 2 and formats[0] is formats[1] and states[0].shape == states[1].shape
    if not is_one_pass or not formats[0].has_scale or states[0].numel() > _ONE_PASS:
        dtypes = [SCALE_DTYPE if part.plane.scale is None else part.plane.scale.dtype for part in parts]
        return [quantize(x, fmt, dtype) for x, fmt, dtype in zip(states, formats, dtypes, strict=True)]
    assert parts[0].plane.scale is not None
    both = torch.stack((states[0], states[1].to(states[0].dtype)))
    codes, scale = quantize(both, formats[0], parts[0].plane.scale.dtype)
    assert scale is not None
    return [Quantized(codes[0], scale[0]), Quantized(codes[1], scale[1])]
