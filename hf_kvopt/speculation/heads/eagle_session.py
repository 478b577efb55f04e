"""Session of an EAGLE head: its own small cache holds an entry for each token that the target has read.

entry t     (feature of token t, embedding of token t + 1)       written by `extend`, true features
drafted     (own hidden state, embedding of the drafted token)   written by `propose`, cropped by the next call
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_kvopt.attention.forward import attention_forward
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.kernels.cpu.draft import MAX_FIRST
from hf_kvopt.speculation.drafters.base import Draft, DraftSession, Plan, Read, Sampler
from hf_kvopt.speculation.heads.compiled import CompiledSteps, weights_of
from hf_kvopt.speculation.heads.growth import ChainGrowth, TreeGrowth
from hf_kvopt.speculation.heads.layer import EagleLayer

if TYPE_CHECKING:
    from hf_kvopt.speculation.heads.eagle import EagleHead


class CachedAttention:
    """Attention over a paged cache.

    `mask` [batch | 1, 1, q_len, kv_len] bool is set if the queries are not a causal run. `lengths` is set if rows are
    right-padded: the padding is cropped before the last layer, which has one query for each row, attends.
    """

    def __init__(self, cache: PagedCache) -> None:
        self._cache = cache
        self.mask: Tensor | None = None
        self.lengths: list[int] | None = None

    def __call__(self, layer: EagleLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append k and v to the cache, and attend; see `Attend`."""
        keys, values = self._cache.update(k, v, layer.layer_idx)
        if self.lengths is not None and q.shape[2] < k.shape[2]:
            self._cache.crop_rows(self.lengths)
            stored: Any = self._cache.layers[layer.layer_idx]
            keys, values = stored.keys, stored.values
        return attention_forward(layer, q, keys, values, self.mask, scaling=layer.scaling)[0]


class EagleSession(DraftSession):
    """Session that owns the head's cache; between calls row i holds `lengths[i]` true entries and some drafted ones."""

    def __init__(self, head: "EagleHead", batch_size: int) -> None:
        self._head = head
        self._cache = PagedCache()
        self._attend = CachedAttention(self._cache)
        self._lengths = [0] * batch_size
        self._drafted = 0  # drafted columns to crop
        # [batch, 1, hidden_size]: hidden state after the root; None if `_steps` holds it.
        self._hidden: Tensor | None = None
        self._position: Tensor | None = None  # [batch, 1]
        self._weights = weights_of(head)
        self._steps: CompiledSteps | None = None  # made by the first draft after the prompt

    def extend(self, read: Read) -> None:
        assert read.features is not None  # the loop brings what `feature_layers` asks for
        head, attend, width = self._head, self._attend, read.tokens.shape[1]
        self._forget_drafts()
        if self._steps is not None and self._steps.has_read:
            self._settle()
        self._lengths = [length + count for length, count in zip(self._lengths, read.counts, strict=True)]
        last = torch.tensor(read.counts, device=read.tokens.device)[:, None] - 1
        self._position = read.positions.gather(1, last)
        if self._steps is not None and read.tokens.numel() <= MAX_FIRST:
            self._steps.note(read)
            self._hidden = None
            return
        attend.mask, attend.lengths = None, None if min(read.counts) == width else self._lengths
        hidden = head.combine(read.features)
        rotation = head.rotary(read.positions, hidden.dtype)
        self._hidden = head.forward(read.following, hidden, rotation, attend, last)
        attend.lengths = None

    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        if not plan.is_chain:
            self._settle()
            return self._tree(plan)
        self._forget_drafts()
        if self._steps is None and self._weights is not None:
            self._steps = CompiledSteps(self._head, self._weights, self._cache, len(self._lengths))
        if self._steps is None:
            return self._chain(plan, sample)
        assert self._position is not None  # extend comes first
        draft, self._drafted = self._steps.chain(self._hidden, self._position, plan, sample)
        self._hidden = None
        return draft

    def select(self, rows: Sequence[int]) -> None:
        self._settle()
        self._steps = None
        index = torch.tensor(rows, dtype=torch.long)
        self._cache.batch_select_indices(index)
        self._lengths = [self._lengths[row] for row in rows]
        if self._hidden is not None and self._position is not None:
            index = index.to(self._hidden.device)
            self._hidden, self._position = self._hidden[index], self._position[index]

    def close(self) -> None:
        self._cache.free()

    def _chain(self, plan: Plan, sample: Sampler) -> Draft:
        head, hidden, position = self._head, self._hidden, self._position
        assert hidden is not None  # extend comes first
        assert position is not None
        self._attend.mask = None
        chain, gamma = ChainGrowth(head, len(hidden), plan.min_confidence, sample), min(plan.gamma, plan.num_nodes)
        rotation = head.rotary(position + torch.arange(gamma, device=position.device), hidden.dtype)
        for depth in range(gamma):
            if depth:
                hidden = head.forward(chain.tokens[-1][:, None], hidden, rotation[:, depth : depth + 1], self._attend)
                self._drafted += 1
            if not chain.add(head.logits(hidden[:, 0])):
                break
        return chain.draft(hidden.device)

    def _tree(self, plan: Plan) -> Draft:
        head, hidden, position = self._head, self._hidden, self._position
        assert hidden is not None  # extend comes first
        assert position is not None
        growth = TreeGrowth(len(hidden), plan, hidden.device)
        columns = self._cache.get_seq_length()
        for depth in range(plan.gamma):
            frontier = growth.expand(torch.log_softmax(head.logits(hidden), dim=-1))
            if depth + 1 == plan.gamma or growth.is_done:
                break
            position = position + 1
            hidden = hidden.gather(1, frontier.parents[:, :, None].expand(-1, -1, hidden.shape[2]))
            batch, nodes, drafted = frontier.ancestors.shape
            seen = torch.ones(batch, 1, nodes, columns + drafted, dtype=torch.bool, device=hidden.device)
            seen[:, 0, :, columns:] = frontier.ancestors
            self._attend.mask = seen
            rotation = head.rotary(position.expand(-1, nodes), hidden.dtype)
            hidden = head.forward(head.to_target(frontier.tokens), hidden, rotation, self._attend)
            self._drafted += nodes
        return growth.draft(head.to_target)

    def _settle(self) -> None:
        """Crop drafted columns, and set `_hidden` to the state after the last token read."""
        self._forget_drafts()
        if self._steps is not None and self._hidden is None:
            self._hidden, self._drafted = self._steps.settle()
            self._forget_drafts()

    def _forget_drafts(self) -> None:
        """Crop the cache to the tokens that were read."""
        if self._drafted:
            self._cache.crop_rows(self._lengths)
            self._drafted = 0
