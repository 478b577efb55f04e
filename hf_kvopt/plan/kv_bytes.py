"""Bytes of a cache for a batch at a length: ours block by block, transformers' own two for comparison.

    paged    blocks x block_size x Σ layers (key heads x bytes_per_vector(key_dim) + likewise for the values)
    dynamic  the tokens that DynamicCache keeps: all, or window - 1 in sliding layers
    static   StaticCache allocated for exactly this length

Source: PagedAttention, arXiv:2309.06180; scales and packing follow quant/formats.py.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from hf_kvopt.plan.blocks import BlockCount, count_blocks, tail_places
from hf_kvopt.plan.geometry import LayerKV
from hf_kvopt.plan.inputs import BadInput
from hf_kvopt.quant import (
    CENTRE_TOKENS,
    LATENTS,
    NATIVE_KV,
    SCALE_DTYPE,
    FormatPolicy,
    KVFormat,
    guard_for,
    require_unsealed,
)
from hf_kvopt.quant.sealed_formats import MAX_TAIL_BLOCKS, SEALED_BLOCK

_NATIVE = FormatPolicy()
CACHES = ("paged", "dynamic", "static")


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """Name of a cache with the settings that determine its bytes.

    Args:
        cache: "paged", "dynamic" or "static".
        formats: formats of a paged cache's layers, as in `QuantizedPagedCache`.
        block_size: tokens of a block.
        max_tokens: cap of the paged cache over all rows, in tokens.
        compileable: a paged cache of fixed capacity `max_tokens`.
        dtype: dtype that the model computes in.
    """

    cache: str = "paged"
    formats: FormatPolicy = _NATIVE
    block_size: int = 16
    max_tokens: int | None = None
    compileable: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __post_init__(self) -> None:
        if self.cache not in CACHES:
            raise BadInput(f"cache must be one of {', '.join(CACHES)}: got {self.cache!r}; for example cache='paged'")
        if self.cache != "paged" and self.formats != _NATIVE:
            raise BadInput(
                f"format belongs to our caches: got format={self.formats.format!r} with cache={self.cache!r}; use "
                "cache='paged'"
            )
        size = self.block_size
        if not isinstance(size, int) or not 16 <= size <= 256 or size & (size - 1):
            raise BadInput(f"block_size must be a power of two from 16 to 256: got {size!r}; for example block_size=16")
        if self.compileable and self.max_tokens is None:
            raise BadInput("compileable=True needs max_tokens: got none; for example max_tokens=batch * context")

    def formats_of(self, layers: Sequence[LayerKV]) -> list[KVFormat]:
        """Return the format of each layer; layers that are not paged are native.

        Raises:
            BadInput: a named layer does not exist.
        """
        own = [layer for layer in layers if layer.copy_of is None]
        paged = [i for i, layer in enumerate(own) if layer.is_paged] or [0]
        try:
            policy = self.formats.resolve(len(own), paged[0], paged[-1])
        except ValueError as error:
            raise BadInput(str(error)) from error
        numbers = [i if layer.copy_of is None else layer.copy_of for i, layer in enumerate(layers)]
        return [self._format(policy, number, layer) for number, layer in zip(numbers, layers, strict=True)]

    def _format(self, policy: FormatPolicy, idx: int, layer: LayerKV) -> KVFormat:
        if self.cache != "paged" or not layer.is_paged:
            return NATIVE_KV
        chosen = policy.at(idx, is_sliding=layer.window is not None)
        is_latent = layer.attention == "MLA"
        if is_latent:
            try:
                require_unsealed(chosen, LATENTS)
            except ValueError as error:
                raise BadInput(str(error)) from error
        # Latents: the rotary part of the keys is stored in place of the values.
        return KVFormat(chosen.k, chosen.k, guard=False) if is_latent else chosen

    @property
    def max_blocks(self) -> int | None:
        """`max_tokens` in blocks, rounded up."""
        return None if self.max_tokens is None else -(-self.max_tokens // self.block_size)

    def row_blocks(self, batch: int) -> int:
        """Blocks of each row of a cache of fixed capacity."""
        assert self.max_blocks is not None
        return -(-self.max_blocks // batch)


class KVBytes(NamedTuple):
    """Bytes of the layers that the cache holds itself; `stock` counts layers that stay transformers' own."""

    content: int  # of the tokens alone
    used: int  # of the blocks that hold them: `cache.stats().used_bytes`
    reserved: int  # of all memory allocated: `cache.stats().reserved_bytes`
    stock: int
    is_within_cap: bool = True  # `max_tokens` suffices


def token_bytes(layer: LayerKV, fmt: KVFormat, dtype: torch.dtype, block_size: int = SEALED_BLOCK) -> int:
    """Return the bytes of one token of one row in a layer, scales included.

    Args:
        layer: the layer.
        fmt: its format.
        dtype: what the model computes in.
        block_size: tokens that share what a sealed block stores once; their part of it is rounded up.

    Raises:
        BadInput: the format cannot pack the layer's channels.
    """
    return -(-block_bytes(layer, fmt, dtype, block_size) // block_size)


def block_bytes(layer: LayerKV, fmt: KVFormat, dtype: torch.dtype, block_size: int) -> int:
    """Return the bytes of one block of a layer, scales included; raises like `token_bytes`."""
    try:
        if fmt.sealed is not None:
            return layer.key_heads * fmt.sealed.k.bytes_per_block(layer.key_dim, block_size) + (
                layer.value_heads * fmt.sealed.v.bytes_per_block(layer.value_dim, block_size)
            )
        return block_size * _vector_bytes(layer, fmt, dtype)
    except ValueError as error:
        raise BadInput(str(error)) from error


def _vector_bytes(layer: LayerKV, fmt: KVFormat, dtype: torch.dtype) -> int:
    """Return the bytes of one token that is stored by itself."""
    return layer.key_heads * fmt.k.bytes_per_vector(layer.key_dim, dtype, SCALE_DTYPE) + (
        layer.value_heads * fmt.v.bytes_per_vector(layer.value_dim, dtype, SCALE_DTYPE)
    )


def scale_bytes(layer: LayerKV, fmt: KVFormat) -> int:
    """Return the bytes of scales, and of what sealed blocks share, that `token_bytes` includes."""
    if fmt.sealed is not None:
        k, v = fmt.sealed.planes
        codes = layer.key_heads * k.width(layer.key_dim) + layer.value_heads * v.width(layer.value_dim)
        return token_bytes(layer, fmt, torch.float32) - codes
    keys, values = (math.prod(plane.scale_shape) * plane.has_scale for plane in (fmt.k, fmt.v))
    return SCALE_DTYPE.itemsize * (layer.key_heads * keys + layer.value_heads * values)


def kv_bytes(
    layers: Sequence[LayerKV],
    formats: Sequence[KVFormat],  # of each layer
    spec: CacheSpec,
    batch: int,
    length: int,
    prompt: int | None,
) -> KVBytes:
    """Return the bytes of `batch` rows of `length` tokens, the first `prompt` of them fed in one forward.

    With `prompt=None` sliding layers count the most that they hold at any time up to `length`.
    """
    tables: dict[tuple[int | None, bool], _Table] = {}
    content = stock = 0
    for layer, fmt in zip(layers, formats, strict=True):
        if not layer.has_kv:
            continue
        size = block_bytes(layer, fmt, spec.dtype, spec.block_size)
        if not layer.is_paged:
            stock += batch * length * size // spec.block_size
            continue
        content += batch * _held(spec, length, layer.window) * size // spec.block_size
        exact = spec.block_size * _vector_bytes(layer, NATIVE_KV, spec.dtype) if fmt.sealed is not None else 0
        # Of fixed capacity: one table for all layers that seal their blocks, and one for all others.
        kind = (None, fmt.sealed is not None) if spec.compileable else (layer.window, False)
        table = tables.setdefault(kind, _Table(0, 0, 0))
        beside = fixed_centre_bytes(layer, fmt, batch, spec.dtype) if spec.compileable else centre_bytes(layer, fmt)
        tables[kind] = _Table(table.block + size, table.beside + beside, table.exact_block + exact)
    if spec.cache != "paged":
        return KVBytes(content, content, content, stock)
    used = reserved = 0
    is_within_cap = True
    for (window, _), table in tables.items():
        blocks = _blocks(spec, batch, length, prompt, window)
        # Each table has its own block space, and the cap applies to each.
        is_within_cap &= blocks.used <= blocks.reserved
        held = blocks.reserved * table.block + table.beside
        reserved += held
        # A block is charged its share of the bytes that its table keeps once.
        used += blocks.used * (held // max(1, blocks.reserved))
        if table.exact_block:
            places = tail_places(batch, length, prompt, window, spec.block_size)
            num_places = batch * MAX_TAIL_BLOCKS if spec.compileable else places.reserved
            reserved += num_places * table.exact_block
            used += places.used * table.exact_block
    if spec.compileable:
        is_within_cap = spec.row_blocks(batch) * spec.block_size >= length
    return KVBytes(content, used, reserved, stock, is_within_cap)


def row_tokens(spec: CacheSpec, length: int) -> int:
    """Return the tokens that a row of `length` takes of `max_tokens`: those of whole blocks."""
    return -(-length // spec.block_size) * spec.block_size


class _Table(NamedTuple):
    """Bytes of all layers that share a window."""

    block: int  # for each block
    beside: int  # for any number of blocks
    exact_block: int  # for each block that is kept exact beside, where layers seal theirs


def centre_bytes(layer: LayerKV, fmt: KVFormat) -> int:
    """Return what a guarded layer keeps beside its blocks: one float32 centre; rows with loud channels add theirs."""
    return 4 * layer.key_heads * layer.key_dim if _is_centred(fmt) else 0


def fixed_centre_bytes(layer: LayerKV, fmt: KVFormat, batch: int, dtype: torch.dtype) -> int:
    """Return what a guarded layer of fixed capacity keeps beside its blocks: of each row a float32 centre, the first
    keys as they came, and whether more are to come."""
    vector = layer.key_heads * layer.key_dim
    return batch * (4 * vector + CENTRE_TOKENS * vector * dtype.itemsize + 1) if _is_centred(fmt) else 0


def _is_centred(fmt: KVFormat) -> bool:
    return fmt.guard and fmt.sealed is None and guard_for(fmt.k).centres


def _held(spec: CacheSpec, length: int, window: int | None) -> int:
    """Return the tokens of a row that a layer must keep."""
    if window is None or spec.compileable:
        return length
    return min(length, window if spec.cache == "static" else window - 1)


def _blocks(spec: CacheSpec, batch: int, length: int, prompt: int | None, window: int | None) -> BlockCount:
    if spec.compileable:
        capacity = spec.row_blocks(batch) * batch
        return BlockCount(capacity, capacity)
    keeps_prompt = spec.formats.seals(window is not None)
    return count_blocks(batch, length, prompt, window, spec.block_size, spec.max_blocks, keeps_prompt)
