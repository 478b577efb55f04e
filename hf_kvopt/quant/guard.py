"""What keeps a few loud channels of the keys from ruining a coarse format.

    stored = quantize((k - centre) H)        q . k = (q H) . stored + q . centre

Centre: Qwen2.5-like models shift some key channels by a constant of many times the rest (a bias on a slow rotary pair).
A row learns that shift from its first 16 tokens and keeps it; q . centre is the same for every key of the row, so
softmax never sees it. Channels without such a shift, which is all of most models, are left alone: taking the mean from
each channel costs twice the loss, because channels of the middle rotary frequencies turn away from it.

Rotation: the orthonormal Hadamard matrix H spreads what is left evenly over the channels (QuaRot, arXiv:2404.00456).
It pays at 4 bits, and neither helps nor hurts at 8.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_kvopt.quant.formats import INT4, Format

# Tokens of a row that its centre is learned from.
CENTRE_TOKENS = 16
_LOUD = 6.0  # a shift counts from so many times the head's median magnitude on
_SPREAD = 0.5  # ... if tokens stray from it by no more than this share of it
_EXACT_DEVICES = ("cpu", "cuda")  # that multiply in float64
_ODD = 8  # ... but for one in so many, such as an attention sink


class Guard(NamedTuple):
    """What is done to keys before they are quantized."""

    centres: bool
    rotates: bool


NO_GUARD = Guard(centres=False, rotates=False)


def guard_for(fmt: Format) -> Guard:
    """The guard that a key format needs.

    A float format resolves small channels beside loud ones, but not the differences between loud ones: e4m3 lost 1.4 %
    of perplexity on the reference model with biases of 40 to 60 and int8 0.5 %; centred, what they lose without biases.
    """
    return Guard(centres=fmt.has_scale, rotates=fmt is INT4)


def centre_of(
    first: Tensor,  # [batch, num_kv_heads, tokens, head_dim]
) -> Tensor:
    """Return the shift of each row's keys by its first tokens, [batch, num_kv_heads, head_dim] float32, mostly zero."""
    x = first.float()
    magnitude = x.abs().flatten(2).median(dim=-1).values[..., None]
    usual = x.median(dim=2, keepdim=True).values
    is_odd = (x - usual).abs() > _SPREAD * usual.abs()
    mean = x.masked_fill(is_odd, 0.0).sum(dim=2) / (~is_odd).sum(dim=2)
    is_steady = is_odd.sum(dim=2) <= x.shape[2] // _ODD
    return mean.where(is_steady & (mean.abs() > _LOUD * magnitude), 0.0)


def hadamard(
    x: Tensor,  # [..., dim] float32
) -> Tensor:
    """Return x H, one vector whatever lies beside it.

    H is symmetric and its own inverse. Where dim is no power of two, it is as many of the largest that divides dim.
    """
    if x.device.type not in _EXACT_DEVICES:
        return _butterflies(x)
    # A matrix that is kept between calls has no place in a graph. In float64, of which float32 keeps nothing of the
    # order of summation, sums and differences give the same as one product, which is fewer operations.
    if torch.compiler.is_compiling() or type(x) is not Tensor:
        return _butterflies(x.double()).float()
    return torch.matmul(x.double(), _matrix(x.shape[-1], x.device, torch.float64)).float()


def _butterflies(x: Tensor) -> Tensor:
    """The same in sums and differences."""
    dim = x.shape[-1]
    size = _block(dim)
    half = 1
    while half < size:
        pairs = x.unflatten(-1, (dim // (2 * half), 2, half))
        a, b = pairs.unbind(-2)
        x = torch.stack((a + b, a - b), dim=-2).flatten(-3)
        half *= 2
    return x * size**-0.5


def guarded(
    states: Tensor,  # [batch, num_kv_heads, tokens, head_dim]
    rotates: bool,
    centre: Tensor | None,  # [batch, num_kv_heads, head_dim]
) -> Tensor:
    """Return keys as they go into a format: less their row's centre, and rotated."""
    if centre is not None:
        states = states.float() - centre.unsqueeze(2)
    return hadamard(states.float()) if rotates else states


def unguarded(
    states: Tensor,  # [batch, num_kv_heads, tokens, head_dim] float32, as stored
    rotates: bool,
    centre: Tensor | None,  # [batch, num_kv_heads, head_dim]
) -> Tensor:
    """Return the keys that stored ones stand for."""
    keys = hadamard(states) if rotates else states
    return keys if centre is None else keys + centre.unsqueeze(2)


def rotate(
    x: Tensor,  # [..., dim]
) -> Tensor:
    """Return x H in x's dtype, as one matrix product."""
    if torch.compiler.is_compiling():
        return hadamard(x.float()).to(x.dtype)
    return torch.matmul(x.float(), _matrix(x.shape[-1], x.device, torch.float32)).to(x.dtype)


@cache
def _matrix(dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return _butterflies(torch.eye(dim, dtype=torch.float64)).to(device, dtype)


def _block(dim: int) -> int:
    return dim & -dim
