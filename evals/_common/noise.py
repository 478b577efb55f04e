"""Bound on how far logits move when a sum is computed in another order, as a share of the largest logit."""

from collections.abc import Mapping
from types import MappingProxyType

# Float32: random and reference models on a CPU move by about 1e-6; a wrong mask, position or block by more than 1e-2.
# The short floats round 2**-8 and 2**-11 at each of many layers; the bound is ten such steps.
LOGIT_NOISE: Mapping[str, float] = MappingProxyType({"float32": 1e-3, "bfloat16": 5e-2, "float16": 1e-2})
