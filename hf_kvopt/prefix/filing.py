"""Filing of rows that are still held: texts of a running batch are found by others before their row is done."""

from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING

from hf_kvopt.prefix.batch import BatchCache
from hf_kvopt.prefix.index import Match

if TYPE_CHECKING:
    from hf_kvopt.prefix.store import PrefixStore


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
