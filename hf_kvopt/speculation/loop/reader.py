"""Reader: a model, its cache, and how many tokens of each row were read into it.

    columns of the cache   0 1 2 3 4 5 6 7 8        rows end together; a row that kept less begins later, and a mask
    row 0                  a b c d e f g h i        as for left padding hides the columns before it
    row 1                  - - p q r s t u v

Both the target and an assistant model are read this way. A model that writes its past elsewhere is detected at once:
the cache must grow by the tokens that were fed.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.speculation.loop.tree import TreeShape, ancestor_mask


class Reader:
    """Reads tokens into the cache and removes those that were not accepted.

    Args:
        model: the model that reads.
        cache: its cache, with `read_lens` tokens of each row in it (padding included).
        read_lens: [batch].
        padding: [batch, prompt length] bool, False at the padding of the prompt; None without padding.
        offsets: [batch] position id of a row's first column; negative if it begins with padding.
        device: device of the tokens; used for offloaded models, which have none.
        takes_positions: the model's forward takes `position_ids`.
        steady: further inputs of the forward: tensors [batch, 1] that hold for every token, or other values.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        read_lens: Sequence[int],
        padding: Tensor | None,
        offsets: Sequence[int],
        device: torch.device,
        takes_positions: bool = True,
        steady: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        self.model, self.cache = model, cache
        self.read_lens, self.padding, self.offsets = list(read_lens), padding, list(offsets)
        self.takes_positions, self.steady = takes_positions, dict(steady)
        self.device = device if model.device.type == "meta" else model.device
        # No token is kept after this column: tokens tried there get the position of the last one.
        self.last_column: int | None = None
        self._keeps_past: bool | None = None  # whether the cache has windows, once it has layers

    def forward(self, tokens: Tensor, shape: TreeShape | None = None, **kwargs: Any) -> Any:
        """Run the model on tokens [batch, q_len] after the end of each row; `shape` is their tree (batch 1).

        Raises:
            UnsupportedModel: the model did not write them to the cache.
        """
        q_len, held = tokens.shape[1], int(self.cache.get_seq_length())
        if self.takes_positions:
            kwargs["position_ids"] = self.positions(q_len, shape)
        if shape is None or len(shape.parents) == max(shape.depths):
            mask: Any = self._mask(q_len)
        else:
            mask = self._tree_mask(shape)
        for name, value in self.steady.items():
            kwargs[name] = value.expand(-1, q_len) if isinstance(value, Tensor) else value
        outputs = self.model(
            input_ids=tokens.to(self.device),
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
            **{compat.cache_keyword(self.model): self.cache},
            **kwargs,
        )
        require_grown(self.model, self.cache, held + q_len)
        return outputs

    def keep(self, q_len: int, paths: Sequence[Sequence[int]]) -> None:
        """Keep, of the last `q_len` tokens of each row, those numbered in `paths`, in that order."""
        kept = [len(path) for path in paths]
        if self._keeps_past is None:
            self._keeps_past = any(self.cache.is_sliding) or self.cache.records_states
        # Where all stays, only what lies behind a window, and copies of states, are left to drop.
        if self._keeps_past or min(kept) < q_len:
            self.cache.keep_paths(q_len, paths)
        self.read_lens = [length + n for length, n in zip(self.read_lens, kept, strict=True)]

    def drop(self, counts: Sequence[int]) -> None:
        """Remove the last `counts[i]` tokens of row i."""
        most = max(counts)
        if most:
            self.read_lens = [length - most for length in self.read_lens]
            self.keep(most, [list(range(most - n)) for n in counts])

    def select(self, rows: Sequence[int]) -> None:
        """Keep only the rows `rows`, in that order."""
        index = torch.tensor(rows)
        self.cache.batch_select_indices(index)
        self.read_lens = [self.read_lens[row] for row in rows]
        self.offsets = [self.offsets[row] for row in rows]
        if self.padding is not None:
            self.padding = self.padding[index.to(self.padding.device)]
        for name, value in self.steady.items():
            if isinstance(value, Tensor):
                self.steady[name] = value[index.to(value.device)]

    def positions(self, q_len: int, shape: TreeShape | None = None) -> Tensor:
        """Return position ids [batch, q_len] of the next tokens."""
        firsts = [length + offset for length, offset in zip(self.read_lens, self.offsets, strict=True)]
        steps = range(q_len) if shape is None else shape.depths
        places = [[first + step for step in steps] for first in firsts]
        if self.last_column is not None:
            lasts = [max(0, self.last_column + offset) for offset in self.offsets]
            places = [[min(place, last) for place in row] for row, last in zip(places, lasts, strict=True)]
        return torch.tensor(places, device=self.device)

    def _mask(self, q_len: int) -> Tensor | None:
        """Return [batch, columns + q_len] bool, False before a row's first token and at padding; None if all True."""
        columns = self.cache.get_seq_length()
        shifts = [columns - length for length in self.read_lens]
        if self.padding is None and not any(shifts):
            return None
        shift = torch.tensor(shifts, device=self.device)[:, None]
        position = torch.arange(columns + q_len, device=self.device) - shift
        mask = position >= 0
        if self.padding is not None:
            width = self.padding.shape[1]
            mask &= (position >= width) | self.padding.gather(1, position.clamp(0, width - 1))
        return mask

    def _tree_mask(self, shape: TreeShape) -> Any:
        """Return a mask over past and tree for each kind of layer: [1, 1, nodes, keys], bool or additive."""
        nodes, columns = len(shape.depths), self.cache.get_seq_length()
        seen = self._mask(nodes)
        past = torch.ones(nodes, columns, dtype=torch.bool, device=self.device)
        if seen is not None:
            past &= seen[:, :columns]
        mask = torch.cat([past, ancestor_mask(shape).to(self.device)], dim=1)
        depths = torch.tensor(shape.depths, device=self.device)
        places = torch.cat([torch.arange(columns, device=self.device), columns + depths])
        # The mask is the one of the model, whatever its cache keeps; chunks are counted from the first token.
        kinds, options = compat.layer_types(self.model.config.get_text_config(decoder=True))
        first = int(past[0].long().argmax()) if columns else 0
        masks = {}
        for layer_idx, (kind, option) in enumerate(zip(kinds, options, strict=False)):
            window = option.get("sliding_window")
            if kind in masks or kind == "dummy":
                continue
            queries, near = (columns + depths)[:, None], mask
            if window is not None and kind == "chunked_attention":
                near = mask & ((places - first) // window == (queries - first) // window)
            elif window is not None:
                near = mask & (places > queries - window)
            masks[kind] = self._as_asked(near[None, None, :, self.cache.get_mask_sizes(nodes, layer_idx)[1] :])
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _as_asked(self, mask: Tensor) -> Tensor:
        if self.model.config._attn_implementation != "eager":
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)


def require_grown(model: PreTrainedModel, cache: PagedCache, expected: int) -> None:
    """Raise UnsupportedModel unless a forward of `model` left `cache` with `expected` columns."""
    held = int(cache.get_seq_length())
    if held != expected:
        raise UnsupportedModel(
            f"speculation reads the past from the cache that it hands to {type(model).__name__}: got one of {held} "
            f"columns where {expected} were expected, so the model drops tokens or keeps its past elsewhere; generate "
            "without drafts"
        )
