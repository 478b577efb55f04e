"""KV memory of a model before it is loaded: bytes of a token and layer, of a batch at a length, and device capacity.

    bytes a token and layer = key heads x key_dim x bytes + value heads x value_dim x bytes (+ scales)

Only the config is read. Predictions equal `cache.stats()` of the live cache, block slack included.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from hf_kvopt.plan.capacity import Capacity, capacity
from hf_kvopt.plan.devices import Device, get_device
from hf_kvopt.plan.geometry import LayerKV, layers_of
from hf_kvopt.plan.inputs import BadInput, parse_tokens, require_positive
from hf_kvopt.plan.kv_bytes import CacheSpec, KVBytes, kv_bytes, row_tokens, scale_bytes, token_bytes
from hf_kvopt.plan.model_config import load_config
from hf_kvopt.plan.weights import Weights, count_weights, require_kv_cache
from hf_kvopt.quant import FormatPolicy, KVFormat


@dataclass(frozen=True, kw_only=True)
class LayerMemory:
    """Storage of one layer: shapes as (heads, channels), and bytes of a token."""

    kind: str  # "full", "sliding", "chunked", "states", "none", or a combination
    window: int | None
    key_shape: tuple[int, int]
    value_shape: tuple[int, int]
    format: str
    bytes_per_token: int


@dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Result of `memory`; sizes in bytes, lengths in tokens.

    `used_bytes` and `reserved_bytes` equal those of `cache.stats()`; `cross_*` belong to the second cache of an
    encoder-decoder. `content_bytes` counts the tokens of both without block slack, `stock_bytes` transformers' own
    layers.
    """

    model_type: str
    attention: str
    batch: int
    context: int
    prompt: int | None
    encoder_context: int | None
    dtype: str
    cache: str
    format: str
    block_size: int | None
    layers: tuple[LayerMemory, ...]
    bytes_per_token: int  # of one row, over all layers that keep every token
    scale_bytes_per_token: int
    content_bytes: int
    used_bytes: int
    reserved_bytes: int
    cross_used_bytes: int
    cross_reserved_bytes: int
    stock_bytes: int
    num_parameters: int | None
    weight_bytes: int | None
    total_bytes: int  # weights and used KV
    max_positions: int | None
    capacity: Capacity | None
    notes: tuple[str, ...]

    @property
    def slack_bytes(self) -> int:
        """Bytes of used blocks that hold no token yet."""
        return self.used_bytes + self.cross_used_bytes - self.content_bytes

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain values for JSON."""
        return asdict(self) | {"slack_bytes": self.slack_bytes}


def memory(
    model: Any,
    *,
    context: int | str = 4096,
    batch: int = 1,
    prompt: int | str | None = None,
    encoder_context: int | str | None = None,
    cache: str = "paged",
    format: str = "native",
    skip_layers: Collection[int | str] = ("sliding",),
    layer_formats: Mapping[int | str, str] | None = None,
    block_size: int | None = None,
    max_tokens: int | str | None = None,
    compileable: bool = False,
    dtype: torch.dtype | str | None = None,
    device: str | Device | None = None,
    budget: int | str | None = None,
    weights: bool = True,
) -> MemoryReport:
    """Compute the KV memory of a model, and of its weights, from its config.

    Args:
        model: a hub id (only its config is downloaded), folder, config.json, dict of fields, config, or model.
        context: tokens of a row in all, such as 32_768 or "32k".
        batch: number of rows.
        prompt: tokens of the first forward; determines what sliding layers hold after it. None: the most they hold.
        encoder_context: tokens of the encoder, for encoder-decoder models; defaults to `context`.
        cache: "paged", or transformers' "dynamic" or "static" for comparison.
        format: format of a paged cache: "native", "int8", "fp8_e4m3", "fp8_e5m2", "int4", "k8v4", or a pair for keys
            and values such as "fp8_e4m3/int4".
        skip_layers: layers that stay native, by default sliding ones; see `QuantizedPagedCache`.
        layer_formats: formats of single layers; see `QuantizedPagedCache`.
        block_size: tokens of a block; None as `PagedCache` chooses.
        max_tokens: cap of the paged cache over all rows; without it pools grow ahead by a quarter.
        compileable: fixed capacity of `max_tokens`.
        dtype: dtype of weights and native storage; defaults to the config's, else bfloat16.
        device: name in the table of `hf_kvopt.plan.devices`, "cpu" or "auto"; 0.9 of its memory is the budget.
        budget: bytes for weights and cache, such as "24GiB"; overrides `device`. Weights beyond the budget raise no
            error; `capacity.fits` is False.
        weights: count the weights (takes a moment for large models).

        Returns:
            A report; its `capacity` is None without `device` and `budget`.

    Raises:
        BadInput: the config or a setting is invalid; a `ValueError` that names the field.
        UnsupportedModel: the model has no KV cache.

    Source: PagedAttention, arXiv:2309.06180; latents, DeepSeek-V2, arXiv:2405.04434. Verified against `cache.stats()`
        of every architecture in tests/plan, and against textbook figures by `python -m evals.memory`.

    Examples:
        >>> gpt2 = {"model_type": "gpt2", "n_layer": 12, "n_head": 12, "n_embd": 768}
        >>> memory(gpt2, context=1000, dtype="float16").content_bytes / 2**20
        35.15625
    """
    config = load_config(model)
    require_kv_cache(config)
    layers = layers_of(config)
    tokens = parse_tokens(context, "context")
    first = None if prompt is None else min(tokens, parse_tokens(prompt, "prompt"))
    encoder = encoder_tokens(config, tokens, encoder_context)
    rows = require_positive(batch, "batch", 8)
    formats = _policy(format, skip_layers, layer_formats)
    block_size = formats.block_size() if block_size is None else block_size
    spec = CacheSpec(
        cache=cache,
        formats=formats,
        block_size=block_size,
        max_tokens=None if max_tokens is None else parse_tokens(max_tokens, "max_tokens"),
        compileable=compileable,
        dtype=chosen_dtype(dtype, config),
    )
    stored = spec.formats_of(layers)
    own = kv_bytes(layers, stored, spec, rows, tokens, first)
    cross = cross_bytes(layers, spec, rows, encoder)
    growing = [(layer, fmt) for layer, fmt in zip(layers, stored, strict=True) if layer.has_kv and layer.window is None]
    place = get_device(device) if isinstance(device, str) else device
    counted = count_weights(config, spec.dtype, place) if weights else None
    weight_bytes = counted.num_bytes if counted else None

    longest = max(tokens, encoder or 0)
    if not (own.is_within_cap and cross.is_within_cap):
        raise BadInput(
            f"max_tokens must hold {rows} x {longest:,} tokens, each row in whole blocks: got {max_tokens!r}; raise it "
            f"to {rows * row_tokens(spec, longest)}"
        )

    def needed(rows: int, tokens: int) -> float:
        return _reserved(layers, stored, spec, rows, tokens, encoder)

    def capped(rows: int, tokens: int) -> float:
        exact = (
            spec
            if spec.cache != "paged"
            else replace(spec, max_tokens=rows * row_tokens(spec, max(tokens, encoder or 0)))
        )
        return _reserved(layers, stored, exact, rows, tokens, encoder)

    decoder = config.get_text_config(decoder=True)
    return MemoryReport(
        model_type=config.model_type,
        attention=_attention(layers),
        batch=rows,
        context=tokens,
        prompt=first,
        encoder_context=encoder,
        dtype=str(spec.dtype).removeprefix("torch."),
        cache=cache,
        format=format,
        block_size=block_size if cache == "paged" else None,
        layers=tuple(_layer_memory(layer, fmt, spec.dtype) for layer, fmt in zip(layers, stored, strict=True)),
        bytes_per_token=sum(token_bytes(layer, fmt, spec.dtype) for layer, fmt in growing),
        scale_bytes_per_token=sum(scale_bytes(layer, fmt) for layer, fmt in growing),
        content_bytes=own.content + cross.content,
        used_bytes=own.used,
        reserved_bytes=own.reserved,
        cross_used_bytes=cross.used,
        cross_reserved_bytes=cross.reserved,
        stock_bytes=own.stock,
        num_parameters=counted.num_parameters if counted else None,
        weight_bytes=weight_bytes,
        total_bytes=own.used + own.stock + cross.used + (weight_bytes or 0),
        max_positions=vars(decoder).get("max_position_embeddings"),
        capacity=capacity(needed, capped, rows, tokens, weight_bytes or 0, place, budget),
        notes=tuple(_notes(layers, spec, counted, weights)),
    )


def chosen_dtype(dtype: torch.dtype | str | None, config: Any) -> torch.dtype:
    """Return the dtype of weights and native storage: `dtype`, else the config's, else bfloat16."""
    chosen = dtype if dtype is not None else getattr(config, "dtype", None) or torch.bfloat16
    found = getattr(torch, chosen.removeprefix("torch."), None) if isinstance(chosen, str) else chosen
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise BadInput(f"dtype must be float32, bfloat16 or float16: got {chosen!r}; for example dtype='bfloat16'")
    return found


def encoder_tokens(config: Any, tokens: int, given: int | str | None) -> int | None:
    """Return the tokens of the encoder: as given, the model's fixed number, or `tokens`; None without an encoder."""
    if not config.is_encoder_decoder:
        if given is not None:
            raise BadInput(f"encoder_context is for encoder-decoder models: got {given!r} for a {config.model_type}")
        return None
    return parse_tokens(given, "encoder_context") if given is not None else _fixed_encoder(config) or tokens


def _fixed_encoder(config: Any) -> int | None:
    """Return the fixed number of frames that speech models encode, or None."""
    return getattr(config, "max_source_positions", None)


def cross_bytes(layers: Sequence[LayerKV], spec: CacheSpec, batch: int, encoder: int | None) -> KVBytes:
    """Return the bytes of cross-attention: one unbounded cache layer for each layer, over the encoder's tokens."""
    if encoder is None:
        return KVBytes(0, 0, 0, 0)
    unbounded = [layer._replace(window=None) for layer in layers]
    return kv_bytes(unbounded, spec.formats_of(unbounded), spec, batch, encoder, encoder)


def _reserved(
    layers: list[LayerKV], stored: list[KVFormat], spec: CacheSpec, batch: int, length: int, encoder: int | None
) -> float:
    """Return the bytes that a cache reserves up to `length` tokens of each row; infinite beyond its cap."""
    own, cross = kv_bytes(layers, stored, spec, batch, length, None), cross_bytes(layers, spec, batch, encoder)
    if not (own.is_within_cap and cross.is_within_cap):
        return math.inf
    return own.reserved + own.stock + cross.reserved


def _policy(
    format: str, skip_layers: Collection[int | str], layer_formats: Mapping[int | str, str] | None
) -> FormatPolicy:
    try:
        return FormatPolicy(format=format, skip_layers=skip_layers, layer_formats=layer_formats or {})
    except ValueError as error:
        raise BadInput(str(error)) from error


def _layer_memory(layer: LayerKV, fmt: KVFormat, dtype: torch.dtype) -> LayerMemory:
    return LayerMemory(
        kind=layer.kind,
        window=layer.window,
        key_shape=(layer.key_heads, layer.key_dim),
        value_shape=(layer.value_heads, layer.value_dim),
        format=fmt.name if layer.has_kv else "-",
        bytes_per_token=token_bytes(layer, fmt, dtype) if layer.has_kv else 0,
    )


def _attention(layers: list[LayerKV]) -> str:
    return " + ".join(dict.fromkeys(layer.attention for layer in layers if layer.has_kv)) or "none"


def _notes(layers: list[LayerKV], spec: CacheSpec, counted: Weights | None, wanted: bool) -> list[str]:
    notes = []
    kinds = {layer.kind for layer in layers}
    if any("states" in kind for kind in kinds):
        notes.append("recurrent and convolution states are not counted: they do not grow with the text")
    if any(layer.has_kv and not layer.is_paged for layer in layers):
        notes.append("some layers stay in transformers' own storage (stock_bytes), indexer keys not counted")
    if "none" in kinds:
        notes.append("layers that read another layer's keys and values, or none, store nothing")
    if spec.cache == "paged" and spec.max_tokens is None:
        notes.append("without max_tokens pools grow ahead, by a quarter or 16 blocks; max_tokens caps what is reserved")
    if (
        any(layer.window for layer in layers)
        and spec.formats.format != "native"
        and "sliding" in spec.formats.skip_layers
    ):
        notes.append("sliding layers stay native: their window bounds them")
    if counted:
        notes += counted.notes
    if wanted and counted is None:
        notes.append("the weights could not be counted: this model cannot be built from its config alone")
    return notes
