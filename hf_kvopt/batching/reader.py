"""PackedReader: one forward of a model over rows of several caches."""

import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.batching.packed import PackedCache, Segment, pack
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.prefix.batch import BatchCache


class Fed(NamedTuple):
    """New tokens of the rows of one cache."""

    cache: BatchCache
    rows: list[list[int]]  # tokens of each row
    starts: list[int]  # position of the first of them


class Outputs(NamedTuple):
    """Results of a packed forward at the places that were asked for."""

    logits: Tensor  # [places, vocab] float32
    hidden_states: tuple[Tensor, ...] | None  # of all tokens, [1, tokens, hidden_size] behind each layer


class PackedReader:
    """Feeds a model packed texts.

    Args:
        model: what reads.
        with_hidden: ask for hidden states too.
    """

    def __init__(self, model: PreTrainedModel, with_hidden: bool = False) -> None:
        self.model, self.with_hidden = model, with_hidden
        self._cache_keyword = compat.cache_keyword(model)
        self._takes_places = "logits_to_keep" in inspect.signature(model.forward).parameters

    def read(self, fed: Sequence[Fed], places: Sequence[int]) -> Outputs:
        """Read all tokens of `fed`, in this order; logits at `places` of the packed text.

        Raises:
            UnsupportedModel: the model did not write them to their caches.
        """
        device = self.model.device
        ids = [token for part in fed for row in part.rows for token in row]
        rows = [pair for part in fed for pair in zip(part.rows, part.starts, strict=True)]
        positions = [position for row, start in rows for position in range(start, start + len(row))]
        segments = pack([(part.cache, [len(row) for row in part.rows]) for part in fed], device)
        # Some models cannot do without any.
        kept = torch.tensor(places or [len(ids) - 1], device=device)
        extras: dict[str, Any] = {"logits_to_keep": kept} if self._takes_places else {}
        if self.with_hidden:
            extras["output_hidden_states"] = True
        held = [segment.cache.get_seq_length() for segment in segments]
        outputs = self.model(
            input_ids=torch.tensor([ids], device=device),
            position_ids=torch.tensor([positions], device=device),
            use_cache=True,
            return_dict=True,
            **{self._cache_keyword: PackedCache(segments)},
            **extras,
        )
        _require_grown(self.model, segments, held)
        logits = outputs.logits[0]
        if len(logits) != len(kept):
            logits = logits[kept]
        return Outputs(logits[: len(places)].float(), outputs.hidden_states if self.with_hidden else None)


def _require_grown(model: PreTrainedModel, segments: Sequence[Segment], held: Sequence[int]) -> None:
    """Raise UnsupportedModel where a forward did not write its tokens to the caches."""
    for (cache, cut), before in zip(segments, held, strict=True):
        if cache.get_seq_length() != before + cut.q_len:
            raise UnsupportedModel(
                f"{type(model).__name__} did not write {cut.q_len} tokens a row to its cache: got a cache of "
                f"{cache.get_seq_length()} columns that held {before}; generate with model.generate and a PagedCache"
            )
