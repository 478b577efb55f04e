"""Probe: does a model compute the same of packed rows as of each row alone? Tried once, before anything is promised.

    alone     [a0 a1 a2 a3]            packed     [a0 a1 a2 | b0 b1 b2 b3 b4]     then     [a3 | b5]
              [b0 b1 b2 b3 b4 b5]

What no config tells (a layer that mixes neighbours, positions that are counted along the text, keys that are computed
with outside of the attention) shows here as another logit, or as an error, and the model is refused.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.batching.reader import Fed, PackedReader
from hf_kvopt.batching.requirements import vocab_size
from hf_kvopt.errors import KVOptError, UnsupportedModel
from hf_kvopt.prefix.batch import BatchCache
from hf_kvopt.prefix.store import PrefixStore

_LENGTHS = (4, 6)
# Of the largest logit: rounding is far below, another text far above. The wider one is for 16-bit weights.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_COARSE = 0.15


@torch.no_grad()
def require_equal(model: PreTrainedModel) -> None:
    """Read two short texts packed and alone, with keys and values as they are: coarse formats magnify rounding.

    Raises:
        UnsupportedModel: the logits differ by more than rounding, or the model cannot read packed texts at all.
    """
    vocab = vocab_size(model)
    texts = [[(1 + 7 * row + 3 * i * i) % vocab for i in range(length)] for row, length in enumerate(_LENGTHS)]
    name, store = type(model).__name__, PrefixStore(model)
    try:
        packed, alone = _packed(model, store, texts), _alone(model, store, texts)
    except KVOptError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        raise UnsupportedModel(
            f"{name} cannot be batched continuously: got {type(error).__name__} in a forward over two short rows at "
            f"once: {error}; use model.generate, with enable(model) for its cache"
        ) from error
    scale = alone.abs().max()
    most = float((packed - alone).abs().max() / scale)
    if not most <= _TOLERANCE.get(model.dtype, _COARSE):
        raise UnsupportedModel(
            f"{name} cannot be batched continuously: got logits of packed rows that differ from those of each row "
            f"alone by {most:.1%} of the largest one, so that its tokens depend on their neighbours; use "
            "model.generate, with enable(model) for its cache"
        )


def _packed(model: PreTrainedModel, store: PrefixStore, texts: list[list[int]]) -> Tensor:
    """Logits [2 * texts, vocab] behind the last token but one, and the last one, of each text."""
    reader = PackedReader(model)
    caches = [BatchCache(store.blocks) for _ in texts]
    try:
        fed = [Fed(cache, [text[:-1]], [0]) for cache, text in zip(caches, texts, strict=True)]
        lengths = [len(text) - 1 for text in texts]
        ends = [sum(lengths[: i + 1]) - 1 for i in range(len(texts))]
        first = reader.read(fed, ends).logits
        for cache in caches[1:]:
            caches[0].join(cache)
        second = reader.read([Fed(caches[0], [text[-1:] for text in texts], lengths)], range(len(texts))).logits
        return torch.cat([first, second])
    finally:
        for cache in caches:
            cache.close()


def _alone(model: PreTrainedModel, store: PrefixStore, texts: list[list[int]]) -> Tensor:
    """Return the logits of `_packed`, each text having a forward of its own."""
    rows = []
    for text in texts:
        cache = BatchCache(store.blocks)
        inputs: dict[str, Any] = {compat.cache_keyword(model): cache, "use_cache": True, "return_dict": True}
        ids = torch.tensor([text], device=model.device)
        try:
            # With the positions that generate() passes: some models count others by themselves.
            outputs = model(input_ids=ids, position_ids=torch.arange(len(text), device=model.device)[None], **inputs)
            rows.append(outputs.logits[0, -2:].float())
        finally:
            cache.close()
    return torch.stack(rows, dim=1).flatten(0, 1)
