"""QuantizedPagedCache: a paged cache whose blocks hold 2 to 8 bits a channel.

    block of an int8 layer     codes [block_size, num_kv_heads, head_dim] int8     scale [block_size, num_kv_heads] fp16

Formats below 8 bits seal whole blocks, see `pool.sealed`. In the others, and in pairs of formats, a token is quantized
once, alone, when it is written: what a later step reads does not depend on the rest of the batch,
or on the tokens before it, but for the shift that a row of keys learns from its first 16 tokens where a model has loud
key channels. A row that begins with fewer keeps those as they came until the sixteenth; where that shows another shift,
they are quantized once more, from what came. So a text is stored alike however it is cut.
"""

import functools
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from transformers import PreTrainedConfig

from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.errors import nearest
from hf_kvopt.pool.storage import require_readable
from hf_kvopt.quant import FormatPolicy, get_kv_format
from hf_kvopt.quant.policy import LayerName


class QuantizedPagedCache(PagedCache):
    """`PagedCache` in about half (8 bits) to a fifth (3 bits) of bfloat16's memory.

    Args:
        config: see `PagedCache`.
        format: "int8", "fp8_e4m3" or "fp8_e5m2"; "int4", "k8v4", "k4v2" or "int3", which seal blocks of 64 tokens when
            they are full, all but a row's first one and its newest ones; or a pair "keys/values" of formats of single
            tokens, such as "int8/int4", for latent attention, which has no blocks to seal.
        skip_layers: layers that stay as the model computes them: numbers (negative from the end), "first", "last",
            "sliding". Sliding layers by default, as they hold a window only; () to quantize those as well.
        layer_formats: formats of single layers by the same names, such as {"first": "int8", -1: "native"}; they go
            before `skip_layers`, and a number before a name.
        guard: "auto" takes from keys the shift of loud channels, as Qwen2.5's biases make them, and
            rotates integer keys of single tokens, so that few channels do not spoil the rest; "off" leaves keys alone;
            see `quant.guard`. Sealed blocks need none.
        exact_prefill: let the first prompt attend to its own states as they came. By default it attends to what is
            stored, so that a token sees the same keys however the text is cut into chunks, shared or read again. Exact
            states save 1 to 11 % of the KL divergence behind a prompt of 512 tokens (the most in int4) and cost no time
            (reference model on a CPU, docs/notes/quantized-caches.md): worth it where a prompt is read once, in one
            piece.
        options: see `PagedCache`.

    Each token and KV head has a float16 scale inside the block (int4 in a pair: two, of the even and the odd channels).
    A token with NaN or Inf under a scale, or with a magnitude beyond 8 million (int4: 500,000; sealed: 60,000), reads
    back as NaN in all its channels under that scale, so that the output shows it; other tokens are not touched. Layers
    with latent attention (DeepSeek) store latents and rotary keys both in the keys' format.

    Raises:
        ValueError: an unknown format, guard or layer; a format that seals blocks for latents; or, at the first update,
            a head_dim that codes of 4 bits cannot pack.
        UnsupportedDevice: a format that no visible card can read (float8 e4m3 before compute capability 8.9).

    Source: KIVI, arXiv:2402.02750 (keys and values lose differently); QuaRot, arXiv:2404.00456 (rotation); transformers
    issues #35185 (key biases ruin 4-bit keys), #48677 (dequantizing the past at each step is slower than bfloat16).

    Examples:
        >>> output = model.generate(**inputs, cache=QuantizedPagedCache(model.config, format="int8"))
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        format: str = "int8",
        skip_layers: Collection[LayerName] = ("sliding",),
        layer_formats: Mapping[LayerName, str] | None = None,
        guard: str = "auto",
        exact_prefill: bool = False,
        **options: Any,
    ) -> None:
        known = option_names(QuantizedPagedCache)
        for name in options:
            if name not in known:
                raise TypeError(
                    f"QuantizedPagedCache takes no option {name!r}: expected one of {sorted(known)}"
                    f"{nearest(name, known)}"
                )
        formats = FormatPolicy(
            format=format,
            skip_layers=skip_layers,
            layer_formats={} if layer_formats is None else layer_formats,
            guard=guard,
            exact_prefill=exact_prefill,
        )
        if config is None and formats.needs_layer_count:
            raise ValueError(
                "a layer named from the end needs the model's config: got none; pass "
                "QuantizedPagedCache(model.config, ...)"
            )
        for name in {format, *formats.layer_formats.values()}:
            require_readable(get_kv_format(name))
        super().__init__(config, formats=formats, **options)


@functools.cache
def option_names(kind: type[PagedCache]) -> frozenset[str]:
    """Return what a cache of `kind` can be told by name, beside the model's config."""
    kinds: tuple[type[PagedCache], ...] = (PagedCache, kind)
    found = [parameter for each in kinds for parameter in inspect.signature(each).parameters.values()]
    names = frozenset(parameter.name for parameter in found if parameter.kind is inspect.Parameter.KEYWORD_ONLY)
    return names if kind is PagedCache else names - {"formats"}  # which it makes of its own options
