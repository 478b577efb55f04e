"""Bytes of weights that a config's quantization_config packs, and the modules that it leaves unpacked.

    packed matrix = weights x bits / 8 + scales: one for each tile of rows x columns, by method
    unpacked      what the config names (modules_to_not_convert, ignore, ...), else the output head; whatever is no
                  linear layer or stack of experts: embeddings, biases, norms

Source: transformers' quantizers (`quantizers/base.py` for what is skipped), the layouts of GPTQ (arXiv:2210.17323),
AWQ (arXiv:2306.00978), QLoRA (arXiv:2305.14314) and microscaling formats (arXiv:2310.10537).
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

from hf_kvopt.plan.devices import Device

Fields = Mapping[str, Any]


class Scale(NamedTuple):
    """Bits stored once for a tile of a matrix; None: all of its rows, or columns."""

    rows: int | None
    columns: int | None
    bits: float


class Packing(NamedTuple):
    """Storage of the weights that a method converts."""

    method: str
    bits: float  # of one weight, without scales
    scales: tuple[Scale, ...]
    skips: tuple[str, ...] | None  # patterns of module names; None: the output head alone
    converts_linear: bool = True
    converts_experts: bool = True

    def packed_bytes(self, shape: Sequence[int]) -> float:
        """Return the bytes of one matrix, or of a stack of matrices, scales included."""
        *stack, rows, columns = shape
        scales = sum(
            math.ceil(rows / (scale.rows or rows)) * math.ceil(columns / (scale.columns or columns)) * scale.bits
            for scale in self.scales
        )
        return math.prod(stack) * (rows * columns * self.bits + scales) / 8

    def converts(self, name: str, module: nn.Module, head: nn.Module | None) -> bool:
        """Return whether the weights of the module called `name` are packed."""
        is_linear = self.converts_linear and isinstance(module, nn.Linear)
        if not (is_linear or (self.converts_experts and name.endswith(".experts"))):
            return False
        return module is not head if self.skips is None else not any(_matches(skip, name) for skip in self.skips)


def packing_of(fields: Fields) -> Packing | None:
    """Return the storage that a quantization_config describes; None for an unknown method."""
    named = str(fields.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in fields else ""))
    method = named.lower().replace("-", "_")
    found = _LAYOUTS[method](fields) if method in _LAYOUTS else None
    if found is None:
        return None
    bits, *scales = found
    skips = next((tuple(fields[name]) for name in _SKIP_LISTS if fields.get(name) is not None), None)
    # GPTQ and related methods pack the decoder's layers only; AWQ also skips the output head, whatever is named.
    if skips is not None and method in ("gptq", "awq", "auto_round") and not fields.get("lm_head"):
        skips = (*skips, "lm_head")
    return Packing(method, bits, tuple(scales), skips, method not in _EXPERTS_ALONE, method not in _LINEAR_ALONE)


def is_unpacked_on(fields: Fields, device: Device) -> bool:
    """Return whether transformers unpacks such weights on `device`, for which it has no kernels."""
    least = _LEAST_CAPABILITY.get(str(fields.get("quant_method")))
    if least is None:
        return False
    if not device.is_gpu:
        return str(fields.get("quant_method")) not in _ALSO_ON_CPU
    return device.capability is not None and device.capability < least


_SKIP_LISTS = ("modules_to_not_convert", "ignored_layers", "ignore", "llm_int8_skip_modules")
_EXPERTS_ALONE = ("mxfp4",)
# These methods replace linear modules, and leave experts stacked in one parameter unpacked.
_LINEAR_ALONE = ("bitsandbytes", "quanto", "eetq", "hqq", "bitnet", "torchao")
# Compute capability below which transformers unpacks while loading (`validate_environment` of the quantizers).
_LEAST_CAPABILITY = {"fp8": (8, 9), "mxfp4": (7, 5)}
_ALSO_ON_CPU = ("mxfp4",)

# Bits of a weight, then its scales.
_Layout = tuple[Any, ...]


def _fp8(fields: Fields) -> _Layout:
    rows, columns = fields.get("weight_block_size", (128, 128)) or (None, None)
    return 8, Scale(rows, columns, 8 if fields.get("scale_fmt") == "ue8m0" else 32)


def _grouped(fields: Fields, *others: Scale) -> _Layout:
    """Return the layout of GPTQ and AWQ: a float16 scale and a zero point of `bits` for each group of a row."""
    bits, group = float(fields.get("bits") or fields.get("w_bit") or 4), int(fields.get("group_size") or 128)
    return bits, Scale(1, group if group > 0 else None, 16 + bits), *others


def _bitsandbytes(fields: Fields) -> _Layout | None:
    if fields.get("load_in_4bit") or fields.get("_load_in_4bit"):
        is_double = fields.get("bnb_4bit_use_double_quant")
        return 4, Scale(1, 64, 8 + 32 / 256 if is_double else 32)
    return 8, Scale(1, None, 32)


def _compressed(fields: Fields) -> _Layout | None:
    groups = [group.get("weights") for group in (fields.get("config_groups") or {}).values()]
    weights = next((group for group in groups if group), None)
    if weights is None:
        return None
    bits, strategy = float(weights.get("num_bits") or 8), weights.get("strategy")
    zero = 0 if weights.get("symmetric", True) else bits
    rows, columns = weights.get("block_structure") or (128, 128)
    tiles = {
        "tensor": Scale(None, None, 16 + zero),
        "channel": Scale(1, None, 16 + zero),
        "group": Scale(1, weights.get("group_size") or 128, 16 + zero),
        "tensor_group": Scale(1, weights.get("group_size") or 16, 8),
        "block": Scale(rows, columns, 16),
    }
    return bits, tiles.get(str(strategy), tiles["channel"])


def _by_name(name: object, group: int | None = None) -> _Layout | None:
    """Return the layout for the first number after `int` or `float` in a name such as int4_weight_only."""
    found = re.search(r"(?:int|float)(\d+)", str(name).lower())
    return None if found is None else (float(found[1]), Scale(1, group, 16))


def _hqq(fields: Fields) -> _Layout | None:
    inner = (fields.get("quant_config") or fields).get("weight_quant_params") or {}
    if not inner.get("nbits"):
        return None
    return float(inner["nbits"]), Scale(1, inner.get("group_size"), 32)


_LAYOUTS: dict[str, Callable[[Fields], _Layout | None]] = {
    "fp8": _fp8,
    "fbgemm_fp8": lambda fields: (8, Scale(1, None, 32)),
    "mxfp4": lambda fields: (4, Scale(1, 32, 8)),
    "nvfp4": lambda fields: (4, Scale(1, 16, 8)),
    # GPTQ also stores the group of each column.
    "gptq": lambda fields: _grouped(fields, Scale(None, 1, 32)),
    "awq": _grouped,
    "auto_round": _grouped,
    "bitsandbytes": _bitsandbytes,
    "compressed_tensors": _compressed,
    "hqq": _hqq,
    "quanto": lambda fields: _by_name(fields.get("weights")),
    "torchao": lambda fields: _by_name(fields.get("quant_type")),
    "eetq": lambda fields: (8, Scale(1, None, 16)),
    "bitnet": lambda fields: (2, Scale(None, None, 16)),
}


def _matches(pattern: str, name: str) -> bool:
    """Return whether a pattern names the module: from dot to dot, as a regular expression, or as the end of its name.

    Checkpoints may prefix module names differently from the model, so a pattern may begin after any dot.
    """
    pattern = pattern.removeprefix("re:")
    if name.endswith(pattern):
        return True
    starts = [0, *(found.end() for found in re.finditer(r"\.", name))]
    try:
        return any(re.match(rf"(?:{pattern})(?:(?<=\.)|(?=\.|$))", name[start:]) for start in starts)
    except re.error:
        return False
