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
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache import prefix_file
from hf_kvopt.cache.identity import require_shareable, state_of
from hf_kvopt.cache.prefix_cache import PrefixSharedCache, texts_of
from hf_kvopt.cache.prefix_fill import fill_from
from hf_kvopt.config import CacheConfig
from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.prefix_index import PrefixIndex
from hf_kvopt.pool.storage import KVPool
from hf_kvopt.quant import FormatPolicy
from hf_kvopt.quant.policy import LayerName

# Kept at most where the caller names no cap; what is being generated may take more.
DEFAULT_TOKENS = 65_536


class PrefixStats(NamedTuple):
    """Counts since the store was made, and what it holds now.

    `rows` prompts were looked up, `hits` of them found something; `hit_tokens` of their `prompt_tokens` were there.
    `evictions` counts blocks. `used_bytes` are those of blocks that the tree or a cache holds, `reserved_bytes` all.
    """

    rows: int
    hits: int
    prompt_tokens: int
    hit_tokens: int
    evictions: int
    num_blocks: int
    used_bytes: int
    reserved_bytes: int


class PrefixStore:
    """Blocks that are shared between `generate()` calls on one model.

    Args:
        model_or_config: the model, or its config. With the model, rows of a batch that match different lengths are
            brought level by computing what each lacks; with a config alone all rows start where the shortest match
            ends, and the caller sees to it that the weights never change.
        max_tokens: hard cap on the tokens held; by default the store keeps some 65,000 and grows beyond that only for
            what is being generated.
        block_size: tokens a block.
        format: storage format, see `QuantizedPagedCache`; None stores what the model computes.
        skip_layers: layers that are not quantized; see `QuantizedPagedCache`.
        layer_formats: formats of single layers; see `QuantizedPagedCache`.

    Raises:
        UnsupportedModel: the keys and values of a token depend on more than the tokens before it.
        ValueError, TypeError: an argument that cannot work.

    Threads may share a store; a cache belongs to one thread.

    >>> store = PrefixStore(model)                                                       # doctest: +SKIP
    >>> cache = store.cache(inputs.input_ids, inputs.attention_mask)
    >>> output_ids = model.generate(**inputs, cache=cache)
    >>> store.commit(cache, output_ids)
    """

    def __init__(
        self,
        model_or_config: PreTrainedModel | PreTrainedConfig,
        *,
        max_tokens: int | None = None,
        block_size: int = 16,
        format: str | None = None,
        skip_layers: Collection[LayerName] = ("sliding",),
        layer_formats: Mapping[LayerName, str] | None = None,
    ) -> None:
        if not isinstance(model_or_config, PreTrainedModel | PreTrainedConfig):
            raise TypeError(f"a store takes a transformers model or config: got {type(model_or_config).__name__}")
        compat.check()
        self._model: weakref.ref[PreTrainedModel] | None = None
        parameters: Collection[str] | None = None
        if isinstance(model_or_config, PreTrainedModel):
            self._model = weakref.ref(model_or_config)
            parameters = inspect.signature(model_or_config.forward).parameters.keys()
            model_or_config = model_or_config.config
        self.config: PreTrainedConfig = model_or_config
        require_shareable(self.config, parameters)
        self.formats = FormatPolicy(
            format=format or "native", skip_layers=skip_layers, layer_formats=layer_formats or {}
        )
        limits = CacheConfig(block_size=block_size, max_tokens=max_tokens)
        self.block_size, self.max_tokens, self._max_blocks = block_size, max_tokens, limits.max_blocks
        self.lock = threading.RLock()
        self.index: PrefixIndex
        self.pools: dict[int, KVPool] = {}
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
            CacheStateError: the store was freed.
            OutOfBlocks: the store is smaller than the prompts.
        """
        self.require_alive()
        self._require_mask(input_ids, attention_mask)
        cache = self.new_cache()
        self.begin(cache, input_ids, attention_mask, namespace=namespace)
        return cache

    def begin(
        self,
        cache: PrefixSharedCache,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        namespace: Hashable = None,
        chunk_size: int | None = None,
    ) -> None:
        """Fill an empty cache of this store for the prompts `input_ids`; see `cache`."""
        texts, pads = texts_of(input_ids, attention_mask)
        key = self.key_of(namespace)
        cache.begin(key, namespace, texts, pads)
        with self.lock:
            known = [self.index.match(key, text[:-1]).length for text in texts]
        fill_from(self, cache, input_ids.device, chunk_size)
        self._rows += len(texts)
        self._hits += sum(length > 0 for length in known)
        self._prompt_tokens += sum(map(len, texts))
        self._hit_tokens += sum(known)

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
            rows, lengths = cache.rows_held()
            texts = cache.texts or []
            if output_ids is not None and not cache.is_reordered:
                texts = self._extended(cache, output_ids) or texts
            if cache.key != self.key_of(cache.namespace):
                raise CacheStateError(
                    "the model changed since this cache was made: got other weights, adapters or dtype, so that what "
                    "was computed cannot be told apart; drop the cache"
                )
            num_new = 0
            for i, (text, length) in enumerate(zip(texts, lengths, strict=False)):
                num_new += self.index.insert(cache.key, text[:length], [table_rows[i] for table_rows in rows])
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
            return self.index.match(self.key_of(namespace), _as_text(input_ids)).length

    def stats(self) -> PrefixStats:
        """What was found so far, and what is held now."""
        with self.lock:
            reserved = used = 0
            for allocator in self._allocators.values():
                allocator.reclaim()
                size = sum(pool.num_bytes for pool in allocator.pools)
                reserved += size
                used += size * (allocator.num_blocks - allocator.num_free) // max(1, allocator.num_blocks)
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
    def load(cls, path: str | Path, model: PreTrainedModel, *, max_tokens: int | None = None) -> Self:
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
            self._allocators[window] = BlockAllocator(
                self._max_blocks, stays_put=True, on_shortage=self._make_room, lock=self.lock
            )
        return self._allocators[window]

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

    def key_of(self, namespace: Hashable) -> tuple[Hashable, Hashable]:
        """What texts are filed under: equal tokens give equal keys and values under equal keys alone."""
        model = self.model
        if self._model is not None and model is None:
            raise CacheStateError("the model of this prefix store is gone: got a further use of it; make a new store")
        return (None if model is None else state_of(model)), namespace

    def _pin(self, input_ids: Tensor | Sequence[int], namespace: Hashable, count: int) -> int:
        with self.lock:
            match = self.index.match(self.key_of(namespace), _as_text(input_ids))
            self.index.pin(match, count)
            return match.length

    def _require_mask(self, input_ids: Tensor, attention_mask: Tensor | None) -> None:
        """`generate` takes pad tokens for padding where no mask says otherwise."""
        generation = getattr(self.model, "generation_config", None)
        pad = getattr(generation, "pad_token_id", None)
        if attention_mask is None and pad is not None and bool((input_ids == pad).any()):
            raise ValueError(
                f"input_ids hold the pad token {pad}: got no attention_mask, so that nobody can tell padding from "
                "text; pass the one that generate() gets"
            )

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
        ends = _end_tokens(self.model)
        return [text + _until(row[columns:], ends) for text, row in zip(texts, rows, strict=True)]


def _as_text(input_ids: Tensor | Sequence[int]) -> list[int]:
    """One text, as a list."""
    ids = input_ids if isinstance(input_ids, Tensor) else torch.tensor(list(input_ids), dtype=torch.long)
    if ids.dim() == 2 and len(ids) == 1:
        ids = ids[0]
    if ids.dim() != 1:
        raise ValueError(f"one text is expected, [length] or [1, length]: got {list(ids.shape)}")
    text: list[int] = ids.tolist()
    return text


def _end_tokens(model: PreTrainedModel | None) -> set[int]:
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return set() if ends is None else {ends} if isinstance(ends, int) else set(ends)


def _until(tokens: list[int], ends: set[int]) -> list[int]:
    """Up to and with the first token that ends a text; what follows is padding."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))]
