"""Reader: a model, its cache, and how far each row of the batch has been read into it.

    columns of the cache   0 1 2 3 4 5 6 7 8        rows end together; a row that kept less begins later, and a mask
    row 0                  a b c d e f g h i        like that of left padding hides what lies before
    row 1                  - - p q r s t u v

The target is read this way, and so is an assistant model.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.draft.tree import TreeShape, ancestor_mask


class Reader:
    """Reads tokens into the cache and takes back those that were not accepted.

    Args:
        model: whatever reads.
        cache: its cache, with `read_lens` tokens of each row in it (padding included).
        read_lens: [batch].
        padding: [batch, prompt length] bool, False at the padding of the prompt; None where there is none.
        offsets: [batch] position id of a row's first token; negative where padding comes before it.
        takes_positions: whether the model's forward takes `position_ids`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: PagedCache,
        read_lens: Sequence[int],
        padding: Tensor | None,
        offsets: Sequence[int],
        takes_positions: bool = True,
    ) -> None:
        self.model, self.cache = model, cache
        self.read_lens, self.padding, self.offsets = list(read_lens), padding, list(offsets)
        self.takes_positions = takes_positions
        self.device = model.device

    def forward(self, tokens: Tensor, shape: TreeShape | None = None, **kwargs: Any) -> Any:
        """Outputs for tokens [batch, q_len], each row behind its end; `shape` where they are a tree (batch 1)."""
        q_len = tokens.shape[1]
        if self.takes_positions:
            kwargs["position_ids"] = self.positions(q_len, shape)
        if shape is None or len(shape.parents) == max(shape.depths):
            mask: Any = self._mask(q_len)
        else:
            mask = self._tree_mask(shape)
        return self.model(
            input_ids=tokens,
            attention_mask=mask,
            use_cache=True,
            return_dict=True,
            **{compat.cache_keyword(self.model): self.cache},
            **kwargs,
        )

    def keep(self, q_len: int, paths: Sequence[Sequence[int]]) -> None:
        """Of the last `q_len` tokens of each row, keep those numbered in `paths`, in that order."""
        kept = [len(path) for path in paths]
        self.cache.keep_paths(q_len, paths)
        self.read_lens = [length + n for length, n in zip(self.read_lens, kept, strict=True)]

    def select(self, rows: Sequence[int]) -> None:
        """Let row i be what row `rows[i]` was."""
        index = torch.tensor(rows)
        self.cache.batch_select_indices(index)
        self.read_lens = [self.read_lens[row] for row in rows]
        self.offsets = [self.offsets[row] for row in rows]
        if self.padding is not None:
            self.padding = self.padding[index.to(self.padding.device)]

    def positions(self, q_len: int, shape: TreeShape | None = None) -> Tensor:
        """[batch, q_len] position ids of the next tokens."""
        firsts = [length + offset for length, offset in zip(self.read_lens, self.offsets, strict=True)]
        steps = range(q_len) if shape is None else shape.depths
        return torch.tensor([[first + step for step in steps] for first in firsts], device=self.device)

    def _mask(self, q_len: int) -> Tensor | None:
        """[batch, columns + q_len]: False before the first token of a row and at its padding; None: nothing to hide."""
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
        """A mask over past and tree for each kind of layer; [1, 1, nodes, keys], bool or additive as the model asks."""
        nodes, columns = len(shape.depths), self.cache.get_seq_length()
        seen = self._mask(nodes)
        past = torch.ones(nodes, columns, dtype=torch.bool, device=self.device)
        if seen is not None:
            past &= seen[:, :columns]
        mask = torch.cat([past, ancestor_mask(shape).to(self.device)], dim=1)
        depths = torch.tensor(shape.depths, device=self.device)
        places = torch.cat([torch.arange(columns, device=self.device), columns + depths])
        masks = {}
        for layer_idx, kind in enumerate(self._kinds()):
            if kind in masks:
                continue
            window = self._windows()[layer_idx]
            near = mask if window is None else mask & (places > (columns + depths)[:, None] - window)
            masks[kind] = self._as_asked(near[None, None, :, self.cache.get_mask_sizes(nodes, layer_idx)[1] :])
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def _kinds(self) -> list[str]:
        """The attention of each layer, in the words of the model's config."""
        config = self.model.config.get_text_config(decoder=True)
        return ["attention"] if len(set(self._windows())) == 1 else list(config.layer_types)

    def _windows(self) -> list[int | None]:
        return [getattr(layer, "sliding_window", None) for layer in self.cache.layers]

    def _as_asked(self, mask: Tensor) -> Tensor:
        if self.model.config._attn_implementation != "eager":
            return mask
        dtype = self.model.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
