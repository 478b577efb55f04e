"""Masks as patterns: causal, sliding and padded attention in a few numbers instead of a [q, kv] tensor.

`lazy_mask` is registered with transformers under the key of the attention. For plain patterns it returns a `LazyMask`,
which our attention reads and which becomes the dense boolean mask for any other reader; for other patterns (chunks,
packed sequences, blockwise image attention, user functions) it returns the dense mask.
"""

from collections.abc import Callable
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_kvopt import compat
from hf_kvopt.attention.support import takes_boolean_masks
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.kernels import devices
from hf_kvopt.pool.lazy import LazyTensor


class Pattern(NamedTuple):
    """Visible keys as a pattern: query i of q_len is at key position kv_len - q_len + i."""

    is_causal: bool
    window: int | None  # only keys with position > query position - window are visible


class LazyMask(LazyTensor):
    """A boolean mask [batch, 1, q_len, kv_len] that is made dense when it is read.

    Args:
        shape: the mask's shape.
        device: the mask's device.
        pattern: the pattern of every row.
        padding: [batch, kv_len] bool, False where a row has no token; None without padding.
        make_dense: builds the dense tensor.
    """

    sizes: tuple[int, int, int, int]  # the shape, faster to read than a tensor's
    pattern: Pattern
    padding: Tensor | None
    make_dense: Callable[[], Tensor | None]

    @staticmethod
    def __new__(
        cls: type,
        shape: tuple[int, int, int, int],
        device: torch.device,
        pattern: Pattern,
        padding: Tensor | None,
        make_dense: Callable[[], Tensor | None],
    ) -> "LazyMask":
        """Make a mask from the arguments of the class."""
        mask = LazyMask.wrap(shape, torch.bool, device)
        mask.sizes, mask.pattern, mask.padding, mask.make_dense = shape, pattern, padding, make_dense
        return mask

    @cached_property
    def starts(self) -> list[int] | None:
        """First key position of each row if padding is on the left only, else None; waits for the device once."""
        if self.padding is None:
            return [0] * self.shape[0]
        columns = torch.arange(self.shape[-1], device=self.padding.device)
        # In a row of padding only, argmax returns 0 although there is no first token.
        is_left = (columns >= self.device_starts[:, None]).eq(self.padding).all()
        *first, is_left = torch.cat([self.device_starts, is_left[None].int()]).tolist()
        return first if is_left else None

    @cached_property
    def device_starts(self) -> Tensor:
        """Column of each row's first token where there is padding, [batch] int32 on the mask's device."""
        assert self.padding is not None
        return self.padding.int().argmax(-1).int()

    @cached_property
    def key_mask(self) -> Tensor | None:
        """`padding` in the shape for attention: [batch, 1, 1, kv_len] bool; None without padding."""
        return None if self.padding is None else self.padding[:, None, None, :]

    def dense(self) -> Tensor:
        mask = self.make_dense()
        assert mask is not None  # the skips that would leave it out are off
        return mask.contiguous()

    def rewrap(self) -> "LazyMask":
        return LazyMask(self.sizes, self.device, self.pattern, self.padding, self.make_dense)

    def before_fallback(self, op: str) -> None:
        # Adding a boolean mask to scores shifts them by one: a wrong token, not an error.
        if op.startswith(("aten.add", "aten.sub", "aten.mul", "aten.rsub")):
            raise UnsupportedModel(
                f"this model computes with its attention mask ({op}): got attn_implementation='hf_kvopt', whose masks "
                "are boolean; load the model with attn_implementation='eager' and pass the cache alone"
            )

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"LazyMask(shape={tuple(self.shape)}, pattern={self.pattern}, padded={self.padding is not None})"


def lazy_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = compat.causal_mask_function,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """Make the mask of a forward, with the arguments of transformers' `AttentionMaskInterface`.

    Returns a `LazyMask` or a dense bool [batch, 1, q_len, kv_len]; for models that need it, transformers' eager float
    mask.
    """
    arguments = dict(
        kwargs, batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
        mask_function=mask_function, attention_mask=attention_mask, device=device,
        allow_is_causal_skip=False, allow_is_bidirectional_skip=False,
    )  # fmt: skip
    config = kwargs.get("config")
    if config is not None and not takes_boolean_masks(type(config)):
        return compat.eager_mask(**arguments)
    if torch.compiler.is_compiling() or (isinstance(q_offset, Tensor) and q_length == 1):
        return compat.sdpa_mask(**arguments)
    q_offset = int(q_offset)
    pattern = describe(mask_function)
    is_aligned = q_offset + q_length == kv_offset + kv_length
    if pattern is None or (not is_aligned and pattern != Pattern(False, None)):
        return compat.sdpa_mask(**arguments)
    if pattern.is_causal and attention_mask is not None and attention_mask.shape[-1] < q_offset + q_length:
        raise CacheStateError(
            f"attention_mask covers {attention_mask.shape[-1]} tokens: got {q_length} new ones behind {q_offset} "
            "cached ones; a mask covers both. Where generate() made it, the cache is not shorter than the prompt: call "
            "cache.reset(), or cache.crop(-n) so that at least the last prompt token is missing"
        )
    padding = compat.prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        # Checked once for each forward on a CPU only: a GPU would have to synchronize, so there padding is always
        # passed on.
        if devices.is_on_host(padding) and bool(padding.all()):
            padding = None
    shape = (batch_size, 1, q_length, kv_length)
    return LazyMask(shape, torch.device(device), pattern, padding, lambda: compat.sdpa_mask(**arguments))


def describe(mask_function: Callable[..., Any]) -> Pattern | None:
    """Return the pattern that one of transformers' mask functions implements; None for any other function."""
    if mask_function is compat.causal_mask_function:
        return Pattern(is_causal=True, window=None)
    if mask_function is compat.bidirectional_mask_function:
        return Pattern(is_causal=False, window=None)
    parts = _closure(mask_function, _and_mask()).get("mask_functions", ())
    if len(parts) == 2 and parts[1] is compat.causal_mask_function:
        window = _closure(parts[0], _sliding()).get("sliding_window")
        if isinstance(window, int):
            return Pattern(is_causal=True, window=window)
    return None


def _closure(function: Callable[..., Any], like: Callable[..., Any]) -> dict[str, Any]:
    """Return the captured variables of `function` if it was made by the same code as `like`, else none."""
    code = getattr(function, "__code__", None)
    if code is None or code is not like.__code__:
        return {}
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(code.co_freevars, cells, strict=True)}


@cache
def _and_mask() -> Callable[..., Any]:
    """Return a mask function that transformers combined from parts."""
    made: Callable[..., Any] = compat.and_masks(compat.causal_mask_function)
    return made


@cache
def _sliding() -> Callable[..., Any]:
    """Return a sliding-window mask function of transformers."""
    made: Callable[..., Any] = compat.sliding_window_overlay(1)
    return made
