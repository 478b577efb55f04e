"""PrefixStore: keys and values that outlive a `generate()` call, found again by the tokens they belong to.

    store.cache(ids, mask) ──► match each row ──► compute what rows lack beside others ──► PrefixSharedCache
    store.commit(cache, output_ids) ──► the tree keeps the new blocks ──► least recently used ones go when room is short

A prompt is computed once: across calls, and inside a batch whose rows begin alike. Sharing is by block table, so that
it goes with every storage format (RadixAttention, arXiv:2312.07104; transformers #24841, #34232)."""

import threading
from collections.abc import Collection, Hashable, Mapping, Sequence
from pathlib import Path
from typing import Self

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvopt.cache.stats import PrefixStats
from hf_kvopt.config import CacheConfig, parse_bytes
from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.prefix import file as prefix_file
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.filing import file_call, require_ours
from hf_kvopt.prefix.fill import fill_from
from hf_kvopt.prefix.fill_states import fill_with_states
from hf_kvopt.prefix.index import PrefixIndex
from hf_kvopt.prefix.shared_blocks import SharedBlocks
from hf_kvopt.prefix.texts import as_text, end_tokens, require_mask, texts_of
from hf_kvopt.prefix.tiers.restore import known_length, restore
from hf_kvopt.prefix.tiers.settings import tier_settings
from hf_kvopt.prefix.tiers.tiers import tiers_for
from hf_kvopt.quant import FormatPolicy
from hf_kvopt.quant.policy import LayerName


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
        host_tier: memory of the host, such as "16 GiB", for copies of texts that the device has no room for.
        disk_tier: folder of files for such copies, which other processes and later ones find; see `flush`.
        disk_limit: cap on these files, such as "64 GiB"; None takes half of what the disk has free.
        state_limit: cap on copies of recurrent and convolution states, such as "2 GiB", for models that have layers
            with them; by default as much as the keys and values of `max_tokens` take.

    Raises:
        UnsupportedModel: keys and values depend on more than the tokens before; tiers for a model divided over ranks.
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
        >>> _ = store.commit(cache, output_ids)
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
        host_tier: str | int | None = None,
        disk_tier: str | Path | None = None,
        disk_limit: str | int | None = None,
        state_limit: str | int | None = None,
    ) -> None:
        if not isinstance(model_or_config, PreTrainedModel | PreTrainedConfig):
            raise TypeError(f"a store takes a transformers model or config: got {type(model_or_config).__name__}")
        formats = FormatPolicy(format=format or "native", skip_layers=skip_layers, layer_formats=layer_formats or {})
        block_size = formats.block_size() if block_size is None else block_size
        limits = CacheConfig(block_size=block_size, max_tokens=max_tokens)
        state_bytes = None if state_limit is None else parse_bytes(state_limit, "state_limit")
        self.blocks = SharedBlocks(model_or_config, limits, formats, state_bytes)
        self.blocks.tiers = tiers_for(self.blocks, tier_settings(host_tier, disk_tier, disk_limit))
        self._rows = self._hits = self._prompt_tokens = self._hit_tokens = 0

    @property
    def model(self) -> PreTrainedModel | None:
        """The model, where the store was made from one that is still there."""
        return self.blocks.model

    @property
    def max_tokens(self) -> int | str | None:
        """The hard cap on the tokens held."""
        return self.blocks.max_tokens

    @property
    def formats(self) -> FormatPolicy:
        """Return how the layers are stored."""
        return self.blocks.formats

    @property
    def block_size(self) -> int:
        """Tokens a block."""
        return self.blocks.block_size

    @property
    def lock(self) -> threading.RLock:
        """Held while blocks change."""
        return self.blocks.lock

    @property
    def index(self) -> PrefixIndex:
        """Which texts lie in which blocks."""
        return self.blocks.index

    @property
    def allocators(self) -> list[BlockAllocator]:
        """The block spaces, in the order of a cache's tables."""
        return self.blocks.allocators

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
        self.blocks.require_alive()
        require_mask(self.model, input_ids, attention_mask)
        cache = self.new_cache()
        if not self.begin(cache, input_ids, attention_mask, namespace=namespace):
            raise CacheStateError(
                "prefixes cannot be shared where tokens alone do not decide what is computed: got rows that go through "
                "adapters of their own, or something put before the prompt; use PagedCache for such a call"
            )
        identity = self.blocks.identity
        cache.is_to_check = identity is not None and identity.is_in_place
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
        """Fill an empty cache of this store for the prompts `input_ids`, or leave it as it is and return False."""
        texts, pads = texts_of(input_ids, attention_mask)
        key = self.key_of(namespace)
        if key is None:
            return False
        restore(self.blocks, key, [text[:-1] for text in texts])
        cache.begin(key, namespace, texts, pads)
        fill = fill_from if self.index.checkpoints is None else fill_with_states
        known = fill(self.blocks, cache, input_ids.device, chunk_size)
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
        require_ours(self, cache)
        if not cache.is_reordered and cache.extended(output_ids, end_tokens(self.model)) is None:
            raise ValueError(
                "output_ids must be what generate() returned for this cache, the prompts included: got "
                f"{list(output_ids.shape)} ids for {len(cache.pads)} rows that hold {cache.get_seq_length()} columns, "
                "or other prompts; nothing was kept"
            )
        return self.keep(cache, output_ids, close=True)

    def keep(self, cache: PrefixSharedCache, output_ids: Tensor | None, *, close: bool) -> int:
        """`commit`, where `close` is False leaving the cache usable; without ids the prompts alone are kept."""
        return file_call(self.blocks, cache, output_ids, close=close)

    def pin(self, input_ids: Tensor | Sequence[int], *, namespace: Hashable = None) -> int:
        """Never evict the known prefix of a text; returns how many of its tokens that is. `unpin` undoes it."""
        return self._pin(input_ids, namespace, 1)

    def unpin(self, input_ids: Tensor | Sequence[int], *, namespace: Hashable = None) -> int:
        """Undo one `pin` of the same text."""
        return self._pin(input_ids, namespace, -1)

    def match_length(self, input_ids: Tensor | Sequence[int], *, namespace: Hashable = None) -> int:
        """Return how many of the first tokens of a text the store knows, in tiers below the device too."""
        return known_length(self.blocks, self.key_of(namespace), as_text(input_ids))

    def flush(self) -> None:
        """Wait until copies of all texts lie in the tiers, as far as there is room; a process that ends does so too."""
        if self.blocks.tiers is not None:
            self.blocks.tiers.spiller.flush()

    def stats(self) -> PrefixStats:
        """Return what was found so far, and what is held now."""
        with self.lock:
            used, reserved = self.blocks.num_bytes()
            return PrefixStats(
                rows=self._rows,
                hits=self._hits,
                prompt_tokens=self._prompt_tokens,
                hit_tokens=self._hit_tokens,
                evictions=self.index.num_evicted,
                num_blocks=self.index.num_nodes,
                used_bytes=used,
                reserved_bytes=reserved,
                **self.blocks.state_stats(),
                **({} if self.blocks.tiers is None else self.blocks.tiers.stats()._asdict()),
            )

    def clear(self) -> None:
        """Forget all texts, pinned ones and this model's files too; memory stays reserved, caches in use stay right."""
        self.blocks.clear()

    def free(self) -> None:
        """Forget all texts and give the memory back; caches of this store are refused from then on."""
        self.blocks.free()

    def save(self, path: str | Path) -> None:
        """Write all texts with their keys and values to one safetensors file.

        Raises:
            CacheStateError: a store without its model, whose identity the file must carry.
        """
        self.blocks.require_alive()
        with self.lock:
            prefix_file.save(self.blocks, Path(path))

    @classmethod
    def load(cls, path: str | Path, model: PreTrainedModel, *, max_tokens: int | str | None = None) -> Self:
        """A store with the texts of a file that `save` wrote for the same model.

        Raises:
            CacheStateError: a file of another model, format or version, or one that is damaged; nothing is loaded.
        """
        contents = prefix_file.read(Path(path), model)
        options = contents.options if max_tokens is None else {**contents.options, "max_tokens": max_tokens}
        store = cls(model, **options)
        prefix_file.fill(store.blocks, contents, store.new_cache())
        return store

    def check_integrity(self) -> None:
        """Raise KVOptError unless every block is free or held exactly as often as it is counted."""
        self.blocks.check_integrity()

    def new_cache(self) -> PrefixSharedCache:
        """A cache without a prompt: `begin` makes it one for a prompt, else it is a plain paged cache."""
        return PrefixSharedCache(self.blocks)

    def key_of(self, namespace: Hashable) -> tuple[Hashable, Hashable] | None:
        """Return what texts are filed under; see `SharedBlocks.key_of`."""
        return self.blocks.key_of(namespace)

    def _pin(self, input_ids: Tensor | Sequence[int], namespace: Hashable, count: int) -> int:
        key, text = self.key_of(namespace), as_text(input_ids)
        restore(self.blocks, key, [text])
        with self.lock:
            match = self.index.match(key, text)
            self.index.pin(match, count)
            return match.length
