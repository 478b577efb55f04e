"""Filing of rows that are held: of a `generate` call that ended, and of a running batch, for others to find early."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hf_kvopt.errors import CacheStateError
from hf_kvopt.prefix.batch import BatchCache
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.index import Match
from hf_kvopt.prefix.shared_blocks import SharedBlocks
from hf_kvopt.prefix.texts import end_tokens
from hf_kvopt.prefix.tiers.restore import restore

if TYPE_CHECKING:
    from hf_kvopt.prefix.store import PrefixStore


def file_call(blocks: SharedBlocks, cache: PrefixSharedCache, output_ids: Tensor | None, *, close: bool) -> int:
    """Keep what a `generate` call computed with `cache`; see `PrefixStore.keep`."""
    with blocks.lock:
        # A token was generated behind the prompts: their forward has ended.
        is_prompt_whole = output_ids is not None and output_ids.shape[1] > cache.prompt_columns
        rows, lengths = cache.rows_held(is_prompt_whole=is_prompt_whole)
        texts = cache.texts or []
        if output_ids is not None and not cache.is_reordered:
            texts = cache.extended(output_ids, end_tokens(blocks.model)) or texts
        blocks.require_unchanged(cache.key, cache.namespace)
        if not cache.is_current:
            raise CacheStateError(
                "the store took other pools since this cache was made, for another dtype or device: got a cache "
                "whose states nobody can go on from; drop it"
            )
        num_new = 0
        is_stateful = blocks.index.checkpoints is not None and is_prompt_whole and cache.is_between_forwards
        for i, (text, length) in enumerate(zip(texts, lengths, strict=False)):
            exact = cache.exact_blocks[i] if cache.exact_blocks else ()
            num_new += blocks.index.insert(cache.key, text[:length], [table_rows[i] for table_rows in rows], exact)
            # The states are of all that the row read: not of a text that ended before, or of a prompt alone.
            if is_stateful and 0 < length <= len(text):
                blocks.index.keep_states(cache.key, text[:length], cache.states_of(i))
        if close:
            cache.close()
    return num_new


def file_row(
    store: "PrefixStore",
    key: tuple[Hashable, Hashable] | None,  # of `PrefixStore.key_of`, when the row began; None files nothing
    current_key: tuple[Hashable, Hashable] | None,  # since the last forward
    text: Sequence[int],
    cache: BatchCache,
    row: int,
) -> int:
    """Keep `text`, the first tokens that row `row` of an open cache holds; returns the number of new blocks.

    Nothing is kept of a model that changed since `key` was made, nor where the row gave back blocks behind its window
    that are not known already. Where blocks are sealed, those that the row's next token reads as they were computed are
    kept so.
    """
    with store.lock:
        is_approximate = any(table.is_approximate for table in cache.tables)
        if key is None or not cache.is_current or key != current_key or is_approximate:
            return 0
        released = max(table.holes.count(table.rows[row]) for table in cache.tables)
        if released and store.index.match(key, text).length < released * store.block_size:
            return 0
        exact = cache.exact_blocks[row] if cache.exact_blocks else ()
        return store.index.insert(key, text, [table.rows[row] for table in cache.tables], exact)


def open_row(store: "PrefixStore", text: Sequence[int], key: Hashable) -> BatchCache:
    """Make a cache of one row with what is known of `text`, less its last token, under a key of `key_of`."""
    restore(store.blocks, key, [text[:-1]])
    cache = BatchCache(store.blocks)
    with store.lock:
        match = store.index.match(key, text[:-1]) if key is not None else Match([], 0)
        cache.fill([[row] for row in store.index.take(match)], [0], match.length)
        cache.pin([match.wanted])
        store._rows += 1
        store._hits += match.length > 0
        store._prompt_tokens += len(text)
        store._hit_tokens += match.length
    return cache


def require_ours(store: "PrefixStore", cache: PrefixSharedCache) -> None:
    """Raise CacheStateError unless `cache` is an open one that `store` filled for some prompts."""
    if not isinstance(cache, PrefixSharedCache) or cache.blocks is not store.blocks:
        kind = "one of another store" if isinstance(cache, PrefixSharedCache) else type(cache).__name__
        raise CacheStateError(f"commit takes a cache that this store made: got {kind}; use store.cache(...)")
    store.blocks.require_alive()
    if cache.is_committed or cache.texts is None:
        state = "was committed already" if cache.is_committed else "was reset, or never filled for a prompt"
        raise CacheStateError(f"this cache {state}: got another commit; make one with store.cache(...)")
