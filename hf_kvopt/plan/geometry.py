"""Geometry of each layer's cache: what it stores of a token, read from the config alone.

    MHA, GQA, MQA    keys and values of num_kv_heads x head_dim
    MLA              one latent of kv_lora_rank and one rotary key of qk_rope_head_dim, for any number of heads
    sliding, chunked the same, of a window only        states, none    nothing that grows with the text

Kinds come from transformers' `get_layer_types_and_kwargs`, from which its own caches are built.
"""

from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from hf_kvopt import compat
from hf_kvopt.plan.inputs import BadInput

_KINDS = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "hybrid": "full with states",
    "hybrid_sliding": "sliding with states",
    "linear_attention": "states",
    "conv": "states",
    "dummy": "none",
}
WITHOUT_KV = ("states", "none")
_STOCK = "kept by transformers: "


class LayerKV(NamedTuple):
    """Storage of one token in one layer of the cache."""

    kind: str
    window: int | None  # tokens, None for all
    key_heads: int
    key_dim: int
    value_heads: int
    value_dim: int
    attention: str = ""  # how query heads share KV heads: MHA, GQA, MQA or MLA
    query_heads: int = 0
    nope_dim: int = 0  # channels of an expanded latent key without its rotary part
    expanded_value_dim: int = 0
    copy_of: int | None = None  # layer whose weights this later pass uses, with its own KV

    @property
    def flops_per_pair(self) -> int:
        """Operations of one query over one stored token: multiplications and additions of scores and weighted sum."""
        latent = self.key_dim if self.attention == "MLA" else 0  # read as keys, and again as values
        return 2 * self.query_heads * (self.key_dim + self.value_dim + latent)

    @property
    def expanded_width(self) -> int:
        """Channels of keys and values over all heads, as attention reads them once latents are expanded."""
        if self.attention != "MLA":
            return self.query_heads * (self.key_dim + self.value_dim)
        return self.query_heads * (self.nope_dim + self.value_dim + self.expanded_value_dim)

    @property
    def expansion_flops(self) -> int:
        """Operations that expand one stored latent to the keys and values of all heads."""
        return (
            2 * self.key_dim * self.query_heads * (self.nope_dim + self.expanded_value_dim) * (self.attention == "MLA")
        )

    @property
    def has_kv(self) -> bool:
        """Return whether the layer stores keys and values."""
        return self.kind not in WITHOUT_KV

    @property
    def is_paged(self) -> bool:
        """Return whether our caches hold it in blocks; transformers' own layers keep indexers and compressed keys."""
        return self.has_kv and not self.kind.startswith(_STOCK)


def layers_of(config: PreTrainedConfig) -> list[LayerKV]:
    """Return one entry for each layer of the decoder's cache; later passes through a layer come last.

    Raises:
        BadInput: a field is missing or invalid; the message names it.
    """
    decoder = config.get_text_config(decoder=True)
    try:
        kinds, options = compat.layer_types(decoder)
        parts = list(decoder.per_layer_config)
    except (AttributeError, TypeError, ValueError) as error:
        raise BadInput(
            f"the layers of a {config.model_type} model cannot be read from its config: {error}; expected the fields "
            'that a decoder has, for example "num_hidden_layers": 32'
        ) from error
    layers = [
        _layer(_KINDS.get(kind, _STOCK + kind), option.get("sliding_window"), part)
        for kind, option, part in zip(kinds, options, parts, strict=True)
    ]
    return layers + [layers[idx]._replace(copy_of=idx) for idx in compat.appended_layers(decoder)]


def _layer(kind: str, window: int | None, part: PreTrainedConfig) -> LayerKV:
    if kind in WITHOUT_KV:
        return LayerKV(kind, None, 0, 0, 0, 0)
    if window is not None:
        window = _positive(part, "sliding_window", window, 4096)
    heads = _need(part, 32, "num_attention_heads")
    rank = _field(part, 512, "kv_lora_rank")
    if rank is not None:
        rope, value = _need(part, 64, "qk_rope_head_dim"), _field(part, 128, "v_head_dim") or 0
        return LayerKV(kind, window, 1, rank, 1, rope, "MLA", heads, _field(part, 128, "qk_nope_head_dim") or 0, value)
    kv_heads = 1 if getattr(part, "multi_query", False) else _field(part, 8, "num_key_value_heads", "num_kv_heads")
    kv_heads = heads if kv_heads is None else kv_heads
    if heads % kv_heads:
        raise BadInput(
            f"num_key_value_heads must divide num_attention_heads: got {kv_heads} and {heads}; for example 8 and 32"
        )
    if part.model_type == "mimo_v2_flash" and window is not None:
        kv_heads *= 2  # a constant in the model's code, not in its config
    dim = _field(part, 128, "head_dim", "d_kv") or _need(part, 4096, "hidden_size") // heads
    sharing = "MHA" if kv_heads == heads else "MQA" if kv_heads == 1 else "GQA"
    return LayerKV(kind, window, kv_heads, dim, kv_heads, _field(part, 128, "v_head_dim") or dim, sharing, heads)


def _field(part: PreTrainedConfig, example: int, *names: str) -> int | None:
    """Return the first of `names` that is set, or None."""
    for name in names:
        value = getattr(part, name, None)
        if value is not None and value is not False:
            return _positive(part, name, value, example)
    return None


def _need(part: PreTrainedConfig, example: int, name: str) -> int:
    return _positive(part, name, getattr(part, name, None), example)


def _positive(part: PreTrainedConfig, name: str, value: Any, example: int) -> int:
    if not isinstance(value, int) or value < 1:
        raise BadInput(
            f'a {part.model_type} config needs {name} of at least 1: got {value!r}; expected for example "{name}": '
            f"{example}"
        )
    return value
