"""Registers ops with torch.library under `hf_kvopt::`, so that a compiled graph sees one opaque op each."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

# A `kernels.pattern.Pattern` in a schema: its fields in their order.
PATTERN = (
    "float scale, bool is_causal=True, int? window=None, float? softcap=None, Tensor? sinks=None, "
    "Tensor? starts=None, Tensor? mask=None"
)


def define_op(
    name: str,
    schema: str,
    real: Callable[..., object],
    fake: Callable[..., object],
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Register `hf_kvopt::name`: what it does on every device, and the shapes of what it returns."""
    torch.library.define(f"hf_kvopt::{name}", schema, tags=tags)
    torch.library.impl(f"hf_kvopt::{name}", "default", real)
    torch.library.register_fake(f"hf_kvopt::{name}", fake)
