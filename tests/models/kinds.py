"""The kinds of layers that a model's cache has, as the support table names them."""

from transformers.cache_utils import get_layer_types_and_kwargs

from tests.models.cases import Case
from tests.models.tiny import tiny_config

# In the order in which the table names them.
_NAMES = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "indexed_attention": "indexed",
    "minimax_m3_sparse": "indexed",
    "compressed_sparse_attention": "compressed",
    "heavily_compressed_attention": "compressed",
    "hybrid": "full with states",
    "hybrid_sliding": "sliding with states",
    "linear_attention": "states",
    "conv": "states",
    "dummy": "none",  # another layer's keys and values, or no attention at all
}
_ORDER = [*dict.fromkeys(_NAMES.values()), "latents", "cross"]
_WITHOUT_KEYS = {"states", "none"}


def layer_kinds(case: Case) -> list[str]:
    """What the layers of the cache keep."""
    config = tiny_config(case).get_text_config(decoder=True)
    types, _ = get_layer_types_and_kwargs(config)
    kinds = [_NAMES.get(kind, kind) for kind in types]
    # Stored, not read: where the rank differs by layer, the configuration refuses to name one.
    if vars(config).get("kv_lora_rank") is not None:
        kinds.append("latents")
    if case.modality in ("encoder", "speech"):
        kinds.append("cross")
    return [kind for kind in _ORDER if kind in kinds] + sorted(set(kinds) - set(_ORDER))


def keeps_keys_and_values(case: Case) -> bool:
    """Whether any layer of the cache grows with the text."""
    return not set(layer_kinds(case)) <= _WITHOUT_KEYS


def is_pure_attention(case: Case) -> bool:
    """Whether the layers can be told from what they store: all keep keys and values, and nothing else."""
    return set(layer_kinds(case)) <= {"full", "sliding", "chunked", "none", "latents", "cross"}
