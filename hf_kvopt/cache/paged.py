"""PagedCache: a drop-in cache for `generate` whose memory comes in blocks.

    cache.layers   PagedLayer 0  PagedLayer 1  (stock linear layer)  PagedLayer 3 ...
                        └─ table "full" ─┴──────────┐                     └─ table "window 512"
                           allocator ── pools of layers 0, 1, ...            allocator ── pools of layer 3, ...
    cache._rows    the tables, and what is done to all layers together: `GrowingRows` or `FixedRows`

Growing copies nothing that is there already but at an extension of the pool; beams and forks share blocks and copy
one when they write into it. Instead of `DynamicCache`, which concatenates every layer at every step.
"""

import copy
import weakref
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer, LinearAttentionCacheLayerMixin

from hf_kvopt import compat
from hf_kvopt.cache.bounded import checked_policy, forbid, require_decoder
from hf_kvopt.cache.forwards import ForwardLog
from hf_kvopt.cache.hybrid import HybridLayer
from hf_kvopt.cache.kinds import LayerMaker
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.cache.loop import loop_of
from hf_kvopt.cache.rows import FixedRows, GrowingRows, Kind, TableMaker
from hf_kvopt.cache.stats import CacheStats, measure
from hf_kvopt.cache.watched import WatchedCache
from hf_kvopt.cache.whole import offloads, require_undivided_layers
from hf_kvopt.config import CacheConfig
from hf_kvopt.errors import CacheStateError
from hf_kvopt.eviction.policy import EvictionPolicy
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.quant import FormatPolicy

_NATIVE = FormatPolicy()


class PagedCache(WatchedCache):
    """KV cache in blocks for `model.generate(..., cache=PagedCache())`; before transformers 5.24 the argument is
    `past_key_values`, which newer ones take too.

    Args:
        config: the model's config. Needed for models with linear-attention layers, and for sliding layers to free
            what lies behind their window; without it every layer keeps all tokens, which is right for any model
            whose layers are all attention.
        block_size: tokens a block, a power of two from 16 to 256; None takes 64 where layers seal their blocks, which
            then share parameters, and else 16.
        max_tokens: hard cap on the tokens over all rows, such as 32768 or "32k" (`OutOfBlocks` beyond it); None grows
            as needed.
        compileable: fixed capacity of `max_tokens`; see `CacheConfig`.
        offloading: keep all layers but those that compute in CPU memory, as `DynamicCache` does; needs a GPU.
        offload_only_non_sliding: leave sliding layers on the device.
        policy: what full attention drops, e.g. `SinkRecent(sinks=4, recent=1024)`; needs hf_kvopt's attention.
        formats: how the layers are stored, native by default; see `QuantizedPagedCache`.

    Raises:
        ValueError, TypeError, UnsupportedModel: a value cannot work, or not with this model.

    Source: PagedAttention, arXiv:2309.06180; transformers issues #30536 (cat doubles the peak), #31717.

    Examples:
        >>> with PagedCache(config=model.config) as cache:
        ...     output = model.generate(**inputs, cache=cache)
    """

    def __init__(
        self,
        config: PreTrainedConfig | None = None,
        *,
        block_size: int | None = None,
        max_tokens: int | str | None = None,
        compileable: bool = False,
        offloading: bool = False,
        offload_only_non_sliding: bool = False,
        policy: EvictionPolicy | None = None,
        formats: FormatPolicy = _NATIVE,
    ) -> None:
        if config is not None and not isinstance(config, PreTrainedConfig):
            raise TypeError(f"config must be a model's config, e.g. model.config: got {type(config).__name__}")
        block_size = formats.block_size() if block_size is None else block_size
        self.cache_config = CacheConfig(block_size=block_size, max_tokens=max_tokens, compileable=compileable)
        self.formats = formats
        self.policy = checked_policy(policy, self.cache_config, config)
        self._rows = self._make_rows()
        self.owner: weakref.ref[object] | None = None  # the enabled model that it was handed to
        self.epoch = 0  # counts how often it was emptied
        kwargs: dict[str, Any] = offloads(offloading, offload_only_non_sliding)
        if config is None:
            Cache.__init__(self, layer_class_to_replicate=PagedLayer, **kwargs)  # DynamicCache's builds its own layers
        else:
            require_undivided_layers(config)
            config = config.get_text_config(decoder=True)
            maker = self._layer_maker().resolved(config)
            self.formats = maker.formats
            Cache.__init__(self, layers=require_decoder(policy, config, maker.layers(config)), **kwargs)
            if self._stock_layers():
                self._log = ForwardLog()
            self._states_elsewhere = compat.keeps_states_in_modules(config)
            self._loop = loop_of(config, len(self.layers))

    @property
    def layer_class_to_replicate(self) -> Any:
        """Return what makes a layer that is missing, where the config is not known.

        Computed: a bound method kept on the cache would make a cycle, and a dropped fork would keep its blocks until
        the next garbage collection.
        """
        return self._make_layer if self._makes_layers else None

    @layer_class_to_replicate.setter
    def layer_class_to_replicate(self, value: Any) -> None:
        self._makes_layers = value is not None

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last `-tokens_to_remove` tokens of every row; 0 only drops what lies behind sliding windows.

        Raises:
            ValueError: a positive number (transformers' rule since 5.20).
            CacheStateError: more tokens than are held, or the window before them is gone.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes a number of tokens to remove, as 0 or less: got {tokens_to_remove}")
        self._rows.require_croppable(-tokens_to_remove)
        for layer in self._stock_layers():
            layer.crop(tokens_to_remove)
        self._rows.crop(-tokens_to_remove, self._paged_layers())

    def crop_rows(self, lengths: Sequence[int]) -> None:
        """Cut row i down to `lengths[i]` tokens, where rows accept different numbers of draft tokens.

        Columns that no row needs any more go; a row that is cut further than another begins at a later column, as if
        it were padded on the left, and takes an attention mask of that kind.

        Raises:
            CacheStateError: a row has fewer tokens, the window before the cut is gone, or a layer that cannot do it.
        """
        self._require_no_states("crop_rows")
        self._rows.crop_rows(lengths, self._paged_layers())

    def keep_paths(self, num_tokens: int, paths: Sequence[Sequence[int]]) -> None:
        """Keep of the last `num_tokens` tokens of row i those that `paths[i]` numbers, in its order: an accepted draft.

        What is kept moves together inside the newest blocks, in its stored form; rows that keep less than others begin
        at a later column. Fixed capacity: all rows keep the same path. States (see `recording`): first tokens only.

        Raises:
            CacheStateError: rows differ where they cannot, or the window before the cut is gone.
        """
        states = self._stock_layers() if self.records_states else []
        if not self._rows.is_fixed and not states:
            self._require_no_states("keep_paths")
        for layer in states:
            layer.require_recorded(num_tokens, paths)
        self._rows.keep(num_tokens, paths, self._paged_layers())
        for layer in states:
            layer.keep(num_tokens, [len(path) for path in paths])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i be what row `beam_idx[i]` was; beams share blocks until they write."""
        for layer in self._stock_layers():
            layer.reorder_cache(beam_idx)
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times; the copies share its blocks."""
        for layer in self._stock_layers():
            layer.batch_repeat_interleave(repeats)
        self._select([row for row in range(self.num_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a boolean mask), in that order."""
        for layer in self._stock_layers():
            layer.batch_select_indices(indices)
        if self.num_rows:
            self._select(torch.arange(self.num_rows, device="cpu")[indices.cpu()].tolist())

    def activate_past_recording(self) -> None:
        """Keep what lies behind sliding windows until the next `crop`; a policy makes it raise CacheStateError."""
        forbid(self.policy, "drafts are read several tokens at a time and taken back")
        for layer in self._stock_layers():
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
        for table in self._rows.tables.values():
            table.record_past = table.window is not None

    def reset(self) -> None:
        """Forget all tokens and the batch size; memory stays reserved for the next batch.

        The next batch may come from a model in another dtype, on another device, or of another geometry; then memory is
        reserved anew.
        """
        self.epoch += 1
        if self._log is not None:
            self._log.clear()
        for layer in self._stock_layers():
            layer.reset()
        self._rows.reset(self._paged_layers())

    def free(self) -> None:
        """Forget all tokens and give the memory back, but for pools that forks of this cache still use."""
        self.reset()
        # Forks keep the old allocator and its pools alive; without forks both go here.
        self._rows.forget_tables()
        for layer in self._paged_layers():
            layer.begin_anew(self._rows.table_like)

    def stats(self) -> CacheStats:
        """Blocks, tokens and bytes held now."""
        return measure(self._rows, self._paged_layers())

    def check_integrity(self) -> None:
        """Raise KVOptError unless every block is either free or held exactly as often as it is counted."""
        for table in self._rows.tables.values():
            table.allocator.check_integrity()

    @property
    def is_linear(self) -> list[bool]:
        """Per layer, whether it has states and no keys; hybrid layers have both."""
        return [
            isinstance(layer, LinearAttentionCacheLayerMixin)
            and not isinstance(layer, (HybridLayer, LinearAttentionAndFullAttentionLayer))
            for layer in self.layers
        ]

    @property
    def num_rows(self) -> int:
        """Rows of the batch, 0 while nothing is held."""
        return self._rows.num_rows

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.free()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy-on-write fork, as `copy.deepcopy(cache)` is transformers' way to reuse a prompt."""
        return fork(self, memo)

    def _make_layer(self) -> PagedLayer:
        return self._layer_maker().attention(None, self.formats.at(len(self.layers), is_sliding=False))

    def _layer_maker(self) -> LayerMaker:
        return LayerMaker(self._rows, self.formats, self.policy)

    def _make_rows(self) -> GrowingRows:
        kind = FixedRows if self.cache_config.compileable else GrowingRows
        return kind(TableMaker(self.cache_config, self.policy, self.formats))

    @property
    def _tables(self) -> dict[Kind, BlockTable]:
        return self._rows.tables

    def _paged_layers(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if isinstance(layer, PagedLayer)]

    def _stock_layers(self) -> list[Any]:
        """transformers' own layers, and the states of hybrid ones; not those that hold nothing."""
        layers = [layer.states if isinstance(layer, HybridLayer) else layer for layer in self.layers]
        return [layer for layer in layers if not isinstance(layer, PagedLayer) and not compat.holds_nothing(layer)]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "owner": None, "_call": None, "_guard": None}

    def _require_no_states(self, name: str) -> None:
        forbid(self.policy, f"{name} cuts rows of drafts")
        if self._stock_layers():
            raise CacheStateError(
                f"{name} needs a growing cache of attention layers alone: got one of fixed capacity, or with states "
                "that have no token axis; use crop"
            )

    def _select(self, indices: Sequence[int]) -> None:
        self._rows.select(indices, self._paged_layers())

    def _take_back(self, clock: int) -> None:
        self._rows.take_back(clock, self._paged_layers())


def fork(cache: PagedCache, memo: dict[int, Any]) -> Any:
    """A copy of `cache` over the same blocks; whoever writes first copies the block that is written."""
    child = cache.__class__.__new__(cache.__class__)
    memo[id(cache)] = child
    child.__dict__.update(cache.__dict__)
    child._rows, child._guard, child._log = cache._rows.fork(), None, copy.copy(cache._log)
    child.layers = []
    for layer in cache.layers:
        if isinstance(layer, PagedLayer):
            memo[id(layer)] = layer.fork(child._rows.table_like, memo)  # for others that refer to it
        child.layers.append(copy.deepcopy(layer, memo))
    return child
