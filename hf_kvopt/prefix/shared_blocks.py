"""SharedBlocks: what the caches of one PrefixStore have in common, below the store and its caches.

PrefixStore ──► SharedBlocks ◄── PrefixSharedCache, fill, file
                  lock       one for everything here and for the block spaces
                  index      which texts lie in which blocks
                  pools      keys and values of each layer, by its number
                  limits     tokens a block, and how many blocks are kept
                  identity   what texts are filed under beside their tokens: the model as it is now
"""

import inspect
import threading
import weakref
from collections.abc import Collection, Hashable
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache.kinds import LayerMaker
from hf_kvopt.cache.rows import GrowingRows
from hf_kvopt.cache.states import StateLayer
from hf_kvopt.config import CacheConfig
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.pool import tail
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.sealed_pool import SealedPool
from hf_kvopt.pool.storage import KVPool
from hf_kvopt.pool.tail import Tails
from hf_kvopt.prefix.checkpoints import Checkpoints
from hf_kvopt.prefix.identity import ModelIdentity, require_shareable
from hf_kvopt.prefix.index import PrefixIndex
from hf_kvopt.prefix.probe import require_going_on
from hf_kvopt.quant import FormatPolicy

if TYPE_CHECKING:
    from hf_kvopt.prefix.tiers.tiers import Tiers

# Kept at most where the caller names no cap; what is being generated may take more.
DEFAULT_TOKENS = 65_536


class SharedBlocks:
    """Block spaces, pools and the index of known texts; see the module.

    Args:
        model_or_config: see `PrefixStore`.
        limits: tokens a block, and the cap on tokens.
        formats: how the layers are stored.
        state_limit: most bytes of states that are kept, where layers hold any; see `PrefixStore`.

    Raises:
        UnsupportedModel: the keys and values of a token depend on more than the tokens before it, or layers hold
            states and there is no model to read prompts up to where they are kept.
        ValueError: a format names a layer that does not exist.
    """

    def __init__(
        self,
        model_or_config: PreTrainedModel | PreTrainedConfig,
        limits: CacheConfig,
        formats: FormatPolicy,
        state_limit: int | None = None,
    ) -> None:
        compat.check()
        self._model: weakref.ref[PreTrainedModel] | None = None
        self.identity: ModelIdentity | None = None
        parameters: Collection[str] | None = None
        if isinstance(model_or_config, PreTrainedModel):
            self._model, self.identity = weakref.ref(model_or_config), ModelIdentity(model_or_config)
            parameters = inspect.signature(model_or_config.forward).parameters.keys()
            model_or_config = model_or_config.config
        self.config: PreTrainedConfig = model_or_config
        require_shareable(self.config, parameters)
        self.formats, self.block_size, self.max_tokens = formats, limits.block_size, limits.max_tokens
        self._max_blocks = limits.max_blocks
        self.lock = threading.RLock()
        self.is_freed = False
        self.pools: dict[int, KVPool | SealedPool] = {}
        self._allocators: dict[int | None, BlockAllocator] = {}
        # Makes the block space of every kind of layer, in the order of a cache's tables.
        decoder = self.config.get_text_config(decoder=True)
        maker = LayerMaker(GrowingRows(self.table_for), formats).resolved(decoder)
        layers = maker.layers(decoder)
        self.num_layers = len(layers)
        self.index = PrefixIndex(self.allocators, self.block_size)
        self.state_limit = state_limit
        if any(isinstance(getattr(layer, "states", layer), StateLayer) for layer in layers):
            self._require_reader()
            self.index.checkpoints = Checkpoints(self.state_bytes)
        self.tiers: Tiers | None = None  # below the device

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, where there is one that is still there."""
        return self._model() if self._model is not None else None

    @property
    def allocators(self) -> list[BlockAllocator]:
        """The block spaces, in the order of a cache's tables."""
        return list(self._allocators.values())

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
                on_conflict=self._let_go,
            )
            if self.formats.seals(window is not None):
                allocator.tails = Tails()
        return self._allocators[window]

    def table_for(self, window: int | None, policy: object = None) -> BlockTable:
        """A new table over the block space of all layers with one window (or none); texts stay whole."""
        assert policy is None
        table = BlockTable(self.allocator_for(window), self.block_size, window)
        table.keeps_all = True
        return table

    def key_of(self, namespace: Hashable) -> tuple[Hashable, Hashable] | None:
        """Return what texts are filed under: equal tokens give equal keys and values under equal keys alone.

        None where tokens alone do not decide what is computed: nothing is found then, and nothing kept.
        """
        state = None if self.identity is None else self.identity.state()
        return None if self.identity is not None and state is None else (state, namespace)

    def require_unchanged(self, key: Hashable, namespace: Hashable) -> None:
        """Raise CacheStateError where the model changed since `key` was made."""
        if key != self.key_of(namespace):
            raise CacheStateError(
                "the model changed since this cache was made: got other weights, adapters, hooks, settings or dtype, "
                "so that what is cached is no longer what the model computes; drop the cache, and make another for "
                "the model as it is now"
            )

    def require_alive(self) -> None:
        """Raise CacheStateError after `free`."""
        if self.is_freed:
            raise CacheStateError("this prefix store was freed: got a further use of it; make a new PrefixStore")

    def clear(self) -> None:
        """Forget all texts, pinned ones and those in tiers too; memory stays reserved, caches in use stay right."""
        with self.lock:
            for allocator in self._allocators.values():
                allocator.recount()
            self.index.clear()
        if self.tiers is not None:
            self.tiers.forget()

    def forget_pool(self, layer_idx: int) -> None:
        """Forget all texts, and let the next write to a layer make its pool anew; caches in use keep the old one."""
        with self.lock:
            self.index.clear()
            self.pools.pop(layer_idx, None)

    def free(self) -> None:
        """Forget all texts and give the memory back; any further use is refused. Files of a disk tier stay."""
        if self.tiers is not None:
            self.tiers.close()
        with self.lock:
            self.index.clear()
            self.pools.clear()
            self._allocators.clear()
            self.is_freed = True

    def space_of(self, pool: KVPool | SealedPool) -> int:
        """Number of the block space that a pool follows."""
        return next(i for i, allocator in enumerate(self.allocators) if pool in allocator.pools)

    def keep_pool(self, layer_idx: int, pool: KVPool | SealedPool, allocator: BlockAllocator) -> None:
        """Take a new pool, made before any forward wrote to its layer, for the one that later caches write to."""
        pool.reads.is_first = not allocator.pools
        allocator.pools.append(pool)
        self.pools[layer_idx] = pool

    def _require_reader(self) -> None:
        """Raise UnsupportedModel unless there is a model that reads prompts, where layers hold states, in parts."""
        if self.model is None:
            raise UnsupportedModel(
                "states sum up a text, and the store reads a prompt up to where they are kept: got a "
                f"{type(self.config).__name__} alone; make the store from the model"
            )
        require_going_on(self.model)

    def state_stats(self) -> dict[str, int]:
        """Return how many checkpoints of states are kept, and their bytes, by the names that `PrefixStats` has."""
        kept = self.index.checkpoints
        return {} if kept is None else {"checkpoints": len(kept), "state_bytes": kept.num_bytes}

    def check_integrity(self) -> None:
        """Raise KVOptError unless every block is free or held exactly as often as it is counted."""
        with self.lock:
            for allocator in self._allocators.values():
                allocator.check_integrity()

    def num_bytes(self) -> tuple[int, int]:
        """Return (bytes of blocks that the index or a cache holds, bytes reserved)."""
        used = reserved = 0
        with self.lock:
            for allocator in self._allocators.values():
                allocator.reclaim()
                reserved += sum(pool.num_bytes for pool in allocator.pools)
                used += tail.used_bytes(allocator)
        return used, reserved

    def state_bytes(self) -> int:
        """Return the most bytes of states that are kept: by default as many as the keys and values may take."""
        if self.state_limit is not None:
            return self.state_limit
        spaces = self._allocators.values()
        a_block = sum(pool.num_bytes // max(1, space.num_blocks) for space in spaces for pool in space.pools)
        return self._share * a_block

    @property
    def _share(self) -> int:
        """Blocks that are kept at most where nobody needs more."""
        return self._max_blocks if self._max_blocks is not None else -(-DEFAULT_TOKENS // self.block_size)

    def _let_go(self, allocator: BlockAllocator, blocks: list[int]) -> bool:
        """Forget the ends of texts that lie in `blocks`: a row goes on in them, and there is no room for a copy."""
        return self.index.forget(self.allocators.index(allocator), set(blocks)) > 0

    def _make_room(self, allocator: BlockAllocator, missing: int) -> None:
        """Evict instead of growing where the store holds its share already."""
        excess = allocator.num_blocks + missing - self._share
        if excess > 0:
            self.index.evict(excess)


def device_of(model: PreTrainedModel, layer_idx: int) -> torch.device:
    """Return where a layer computes, also where layers lie on several devices."""
    layers = getattr(model.get_decoder(), "layers", None)
    if layers is None or layer_idx >= len(layers):
        return model.device
    return next(layers[layer_idx].parameters()).device
