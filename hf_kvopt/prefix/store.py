"""PrefixStore: keys and values that outlive a `generate()` call, found again by the tokens they belong to.

    store.cache(ids, mask) ──► match each row ──► compute what rows lack beside others ──► PrefixSharedCache
    store.commit(cache, output_ids) ──► the tree keeps the new blocks ──► least recently used ones go when room is short

A prompt is computed once: across calls, and inside a batch whose rows begin alike. Sharing is by block table, so that
it goes with every storage format (RadixAttention, arXiv:2312.07104; asked for in transformers #24841, #34232).
"""

import inspect
import threading
import weakref
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Self

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache.stats import PrefixStats
from hf_kvopt.config import CacheConfig
from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool import tail
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.sealed import SealedPool
from hf_kvopt.pool.storage import KVPool
from hf_kvopt.pool.tail import Tails
from hf_kvopt.prefix import file as prefix_file
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.fill import fill_from
from hf_kvopt.prefix.identity import ModelIdentity, require_shareable
from hf_kvopt.prefix.index import PrefixIndex
from hf_kvopt.prefix.texts import as_text, end_tokens, require_mask, texts_of, until
from hf_kvopt.quant import FormatPolicy
from hf_kvopt.quant.policy import LayerName

# Kept at most where the caller names no cap; what is being generated may take more.
DEFAULT_TOKENS = 65_536


class PrefixStore:
    """Blocks that are shared between `generate()` calls on one model.

    Args:
        model_or_config: the model, or its config. With the model, rows of a batch that match different lengths are
            brought level by computing what each lacks; with a config alone all rows start where the shortest match
            ends, and the caller sees to it that the weights never change.
        max_tokens: hard cap on the tokens held, such as 65536 or "64k"; by default the store keeps some 65,000 and
            grows beyond that only for what is being generated.
        block_size: tokens a block; see `PagedCache`.
        format: storage format, see `QuantizedPagedCache`; None stores what the model computes.
        skip_layers: layers that are not quantized; see `QuantizedPagedCache`.
        layer_formats: formats of single layers; see `QuantizedPagedCache`.

    Raises:
        UnsupportedModel: the keys and values of a token depend on more than the tokens before it.
        ValueError, TypeError: an argument that cannot work.

    Threads may share a store; a cache belongs to one thread.

    Texts are known to the model as it was when they were computed: not after a step of an optimizer, a write to its
    weights, or a change of adapters, hooks, settings or modules, and again where such a change is undone (see
    `ModelIdentity`). Call `clear()` after a change that nobody can see: a write through `.data` or numpy to a few
    elements of a tensor, or to weights offloaded to a disk; another state in a hook or closure that stays; a function
    replaced in the module that defines the model. A hook is called for what is computed, not for what is found: one
    that goes by the length or the rows of what it gets needs a plain `PagedCache`.

    Examples:
        >>> store = PrefixStore(model)
        >>> cache = store.cache(inputs.input_ids, inputs.attention_mask)
        >>> output_ids = model.generate(**inputs, cache=cache)
        >>> num_new_blocks = store.commit(cache, output_ids)
        >>> store.match_length(output_ids) == output_ids.shape[1] - 1
        True
    """

    def __init__(
        self,
        model_or_config: PreTrainedModel | PreTrainedConfig,
        *,
        max_tokens: int | str | None = None,
        block_size: int | None = None,
        format: str | None = None,
        skip_layers: Collection[LayerName] = ("sliding",),
        layer_formats: Mapping[LayerName, str] | None = None,
    ) -> None:
        if not isinstance(model_or_config, PreTrainedModel | PreTrainedConfig):
            raise TypeError(f"a store takes a transformers model or config: got {type(model_or_config).__name__}")
        compat.check()
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._identity: ModelIdentity | None = None
        parameters: Collection[str] | None = None
        if isinstance(model_or_config, PreTrainedModel):
            self._model, self._identity = weakref.ref(model_or_config), ModelIdentity(model_or_config)
            parameters = inspect.signature(model_or_config.forward).parameters.keys()
            model_or_config = model_or_config.config
        self.config: PreTrainedConfig = model_or_config
        require_shareable(self.config, parameters)
        self.formats = FormatPolicy(
            format=format or "native", skip_layers=skip_layers, layer_formats=layer_formats or {}
        )
        block_size = self.formats.block_size() if block_size is None else block_size
        limits = CacheConfig(block_size=block_size, max_tokens=max_tokens)
        self.block_size, self.max_tokens, self._max_blocks = block_size, limits.max_tokens, limits.max_blocks
        self.lock = threading.RLock()
        self.index: PrefixIndex
        self.pools: dict[int, KVPool | SealedPool] = {}
        self._allocators: dict[int | None, BlockAllocator] = {}
        self._make_empty()

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, where the store was made from one that is still there."""
        return self._model() if self._model is not None else None

    def cache(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, namespace: Hashable = None
    ) -> PrefixSharedCache:
        """A cache for one `generate(input_ids, attention_mask, cache=cache)`, filled as far as it can be.

        Args:
            input_ids: [batch, length]; expanded for beams and returned sequences by itself.
            attention_mask: [batch, length], padding on the left; needed where rows are padded.
            namespace: texts of one namespace are not found from another (users that must not learn of each other).

        Raises:
            ValueError: input that cannot be a left-padded batch of prompts.
            CacheStateError: the store was freed, or tokens alone do not decide what is computed: rows of a batch go
                through adapters of their own, or PEFT puts a soft prompt before the text.
            OutOfBlocks: the store is smaller than the prompts.
        """
        self.require_alive()
        require_mask(self.model, input_ids, attention_mask)
        cache = self.new_cache()
        if not self.begin(cache, input_ids, attention_mask, namespace=namespace):
            raise CacheStateError(
                "prefixes cannot be shared where tokens alone do not decide what is computed: got rows that go through "
                "adapters of their own, or something put before the prompt; use PagedCache for such a call"
            )
        cache.is_to_check = self._identity is not None and self._identity.is_in_place
        return cache

    def begin(
        self,
        cache: PrefixSharedCache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        namespace: Hashable = None,
        chunk_size: int | None = None,
    ) -> bool:
        """Fill an empty cache of this store for the prompts `input_ids`; see `cache`.

        Returns:
            Whether that can be; where not, the cache is as it was.
        """
        texts, pads = texts_of(input_ids, attention_mask)
        key = self.key_of(namespace)
        if key is None:
            return False
        cache.begin(key, namespace, texts, pads)
        with self.lock:
            known = [self.index.match(key, text[:-1]).length for text in texts]
        fill_from(self, cache, input_ids.device, chunk_size)
        self._rows += len(texts)
        self._hits += sum(length > 0 for length in known)
        self._prompt_tokens += sum(map(len, texts))
        self._hit_tokens += sum(known)
        return True

    def commit(self, cache: PrefixSharedCache, output_ids: Tensor) -> int:
        """Keep what `generate` computed with `cache`, and close it.

        Args:
            cache: from `self.cache`, used in one `generate` call.
            output_ids: what that call returned, prompt included. Rows of beam search keep their prompts only.

        Returns:
            The number of blocks that were new.

        Raises:
            CacheStateError: a cache of another store, one that was committed, or a model that changed meanwhile.
            ValueError: ids that do not go on from the prompts that the cache was made for.
        """
        self._require_ours(cache)
        if not cache.is_reordered and self._extended(cache, output_ids) is None:
            raise ValueError(
                "output_ids must be what generate() returned for this cache, the prompts included: got "
                f"{list(output_ids.shape)} ids for {len(cache.pads)} rows that hold {cache.get_seq_length()} columns, "
                "or other prompts; nothing was kept"
            )
        return self.keep(cache, output_ids, close=True)

    def keep(self, cache: PrefixSharedCache, output_ids: Tensor | None, *, close: bool) -> int:
        """`commit`, where `close` is False leaving the cache usable; without ids the prompts alone are kept."""
        with self.lock:
            # A token was generated behind the prompts: their forward has ended.
            is_prompt_whole = output_ids is not None and output_ids.shape[1] > cache.prompt_columns
            rows, lengths = cache.rows_held(is_prompt_whole=is_prompt_whole)
            texts = cache.texts or []
            if output_ids is not None and not cache.is_reordered:
                texts = self._extended(cache, output_ids) or texts
            self.require_unchanged(cache)
            if not cache.is_current:
                raise CacheStateError(
                    "the store took other pools since this cache was made, for another dtype or device: got a cache "
                    "whose states nobody can go on from; drop it"
                )
            num_new = 0
            for i, (text, length) in enumerate(zip(texts, lengths, strict=False)):
                exact = cache.exact_blocks[i] if cache.exact_blocks else ()
                num_new += self.index.insert(cache.key, text[:length], [table_rows[i] for table_rows in rows], exact)
            if close:
                cache.close()
        return num_new

    def pin(self, input_ids: Tensor | Sequence[int], *, namespace: Hashable = None) -> int:
        """Never evict the known prefix of a text; returns how many of its tokens that is. `unpin` undoes it."""
        return self._pin(input_ids, namespace, 1)

    def unpin(self, input_ids: Tensor | Sequence[int], *, namespace: Hashable = None) -> int:
        """Undo one `pin` of the same text."""
        return self._pin(input_ids, namespace, -1)

    def match_length(self, input_ids: Tensor | Sequence[int], *, namespace: Hashable = None) -> int:
        """How many of the first tokens of a text the store knows."""
        with self.lock:
            return self.index.match(self.key_of(namespace), as_text(input_ids)).length

    def stats(self) -> PrefixStats:
        """What was found so far, and what is held now."""
        with self.lock:
            reserved = used = 0
            for allocator in self._allocators.values():
                allocator.reclaim()
                reserved += sum(pool.num_bytes for pool in allocator.pools)
                used += tail.used_bytes(allocator)
            return PrefixStats(
                rows=self._rows,
                hits=self._hits,
                prompt_tokens=self._prompt_tokens,
                hit_tokens=self._hit_tokens,
                evictions=self.index.num_evicted,
                num_blocks=self.index.num_nodes,
                used_bytes=used,
                reserved_bytes=reserved,
            )

    def clear(self) -> None:
        """Forget all texts, pinned ones too; memory stays reserved, caches in use stay right."""
        with self.lock:
            for allocator in self._allocators.values():
                allocator.recount()
            self.index.clear()

    def forget_pool(self, layer_idx: int) -> None:
        """Forget all texts, and let the next write to a layer make its pool anew; caches in use keep the old one."""
        with self.lock:
            self.index.clear()
            self.pools.pop(layer_idx, None)

    def free(self) -> None:
        """Forget all texts and give the memory back; caches of this store are refused from then on."""
        with self.lock:
            self.index.clear()
            self.pools.clear()
            self._allocators.clear()
            self._is_freed = True

    def save(self, path: str | Path) -> None:
        """Write all texts with their keys and values to one safetensors file.

        Raises:
            CacheStateError: a store without its model, whose identity the file must carry.
        """
        self.require_alive()
        with self.lock:
            prefix_file.save(self, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, *, max_tokens: int | str | None = None) -> Self:
        """A store with the texts of a file that `save` wrote for the same model.

        Raises:
            CacheStateError: a file of another model, format or version, or one that is damaged; nothing is loaded.
        """
        return prefix_file.load(cls, Path(path), model, max_tokens)

    def check_integrity(self) -> None:
        """Raise KVOptError unless every block is free or held exactly as often as it is counted."""
        with self.lock:
            for allocator in self._allocators.values():
                allocator.check_integrity()

    def require_alive(self) -> None:
        """Raise CacheStateError after `free`."""
        if self._is_freed:
            raise CacheStateError("this prefix store was freed: got a further use of it; make a new PrefixStore")

    def allocator_for(self, window: int | None) -> BlockAllocator:
        """The block space of all layers with one window (or none)."""
        self.require_alive()
        if window not in self._allocators:
            self._allocators[window] = allocator = BlockAllocator(
                self._max_blocks,
                block_size=self.block_size,
                stays_put=True,
                on_shortage=self._make_room,
                lock=self.lock,
            )
            if self.formats.seals(window is not None):
                allocator.tails = Tails()
        return self._allocators[window]

    def table_for(self, window: int | None) -> BlockTable:
        """A new table over the block space of all layers with one window (or none)."""
        table = BlockTable(self.allocator_for(window), self.block_size, window)
        table.keeps_all = True
        return table

    def new_cache(self) -> PrefixSharedCache:
        """A cache without a prompt: `begin` makes it one for a prompt, else it is a plain paged cache."""
        return PrefixSharedCache(self)

    @property
    def allocators(self) -> list[BlockAllocator]:
        """The block spaces, in the order of a cache's tables."""
        return list(self._allocators.values())

    def _make_empty(self) -> None:
        self._is_freed = False
        self._rows = self._hits = self._prompt_tokens = self._hit_tokens = 0
        self.num_layers = 0
        # Makes the block space of every kind of layer.
        self.num_layers = len(PrefixSharedCache(self).layers)
        self.index = PrefixIndex(self.allocators, self.block_size)

    def _make_room(self, allocator: BlockAllocator, missing: int) -> None:
        """Evict instead of growing where the store holds its share already."""
        share = self._max_blocks if self._max_blocks is not None else -(-DEFAULT_TOKENS // self.block_size)
        excess = allocator.num_blocks + missing - share
        if excess > 0:
            self.index.evict(excess)

    def key_of(self, namespace: Hashable) -> tuple[Hashable, Hashable] | None:
        """What texts are filed under: equal tokens give equal keys and values under equal keys alone.

        None where tokens alone do not decide what is computed: nothing is found then, and nothing kept.
        """
        state = None if self._identity is None else self._identity.state()
        return None if self._identity is not None and state is None else (state, namespace)

    def require_unchanged(self, cache: PrefixSharedCache) -> None:
        """Raise CacheStateError where the model changed since `cache` was made for its prompts."""
        if cache.key != self.key_of(cache.namespace):
            raise CacheStateError(
                "the model changed since this cache was made: got other weights, adapters, hooks, settings or dtype, "
                "so that what is cached is no longer what the model computes; drop the cache, and make another for "
                "the model as it is now"
            )

    def _pin(self, input_ids: Tensor | Sequence[int], namespace: Hashable, count: int) -> int:
        with self.lock:
            match = self.index.match(self.key_of(namespace), as_text(input_ids))
            self.index.pin(match, count)
            return match.length

    def _require_ours(self, cache: PrefixSharedCache) -> None:
        if not isinstance(cache, PrefixSharedCache) or cache.store is not self:
            kind = "one of another store" if isinstance(cache, PrefixSharedCache) else type(cache).__name__
            raise CacheStateError(f"commit takes a cache that this store made: got {kind}; use store.cache(...)")
        self.require_alive()
        if cache.is_committed or cache.texts is None:
            state = "was committed already" if cache.is_committed else "was reset, or never filled for a prompt"
            raise CacheStateError(f"this cache {state}: got another commit; make one with store.cache(...)")

    def _extended(self, cache: PrefixSharedCache, output_ids: Tensor) -> list[list[int]] | None:
        """The prompts with what was generated behind them, up to the end of text; None where the ids do not fit."""
        texts, columns = cache.texts or [], cache.prompt_columns
        rows = output_ids.tolist()
        held = cache.get_seq_length()
        fits = len(rows) == len(texts) and output_ids.shape[1] in (held, held + 1)
        if not fits or any(row[pad:columns] != text for row, pad, text in zip(rows, cache.pads, texts, strict=True)):
            return None
        ends = end_tokens(self.model)
        return [text + until(row[columns:], ends) for text, row in zip(texts, rows, strict=True)]
