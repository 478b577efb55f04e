"""Filling a batch: what rows have in common is computed once, and rows that lack more than others are brought level.

    round 1    row 0  [##################]--      rows 1 and 2 begin like row 0: they wait for its blocks
    round 2    row 1  [==============]###----     they compute their own rest, together: texts of unlike length are
               row 2  [==============]#           padded on the right, and the pads' states are cut off again
    then       all rows hold the prompt but for its last token, which generate() computes

A batch whose rows lack alike, with nothing in common, is left to generate(), which computes it in one forward.
"""

import contextlib
import inspect
from collections.abc import Hashable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hf_kvopt import compat
from hf_kvopt.errors import OutOfBlocks
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.exact import columns_in_common, lengths_to_go_on_from, read_behind
from hf_kvopt.prefix.index import Match

if TYPE_CHECKING:
    from hf_kvopt.prefix.store import PrefixStore

# A forward of its own must save this many tokens, and an eighth of the batch's.
_WORTHWHILE = 32
_CHUNK = 2048
Trie = dict[tuple[int, ...], Any]


def fill_from(store: "PrefixStore", cache: PrefixSharedCache, device: torch.device, chunk_size: int | None) -> None:
    """Fill a cache that has begun as far as the store, and worthwhile forwards of its own, allow."""
    assert cache.texts is not None
    texts = [text[:-1] for text in cache.texts]  # the last token is generate()'s, which wants its logits
    computed: list[PrefixSharedCache] = []  # held, so that the next round evicts nothing of them
    if store.model is not None and len(texts) > 1 and _is_worthwhile(store, cache.key, texts, cache.pads):
        # Too small for the whole batch beside what is in use: go on with what is there.
        with contextlib.suppress(OutOfBlocks):
            while done := _compute_round(store, cache.key, texts, device, chunk_size or _CHUNK):
                computed += done
    with store.lock:
        matches = [store.index.match(cache.key, text) for text in texts]
        columns = min(pad + match.length for pad, match in zip(cache.pads, matches, strict=True))
        if store.index.is_sealed:
            columns = columns_in_common(
                cache.pads, [lengths_to_go_on_from(match.nodes, match.length, store.block_size) for match in matches]
            )
        columns = columns if columns > 1 else 0
        rows = _taken(store, matches, [max(0, columns - pad) for pad in cache.pads])
        cache.fill(rows, cache.pads, columns)
        # The same prompt may come again.
        cache.pin(
            [
                {*match.wanted, *read_behind(len(text), store.block_size)}
                for match, text in zip(matches, texts, strict=True)
            ]
        )


def _is_worthwhile(store: "PrefixStore", key: Hashable, texts: Sequence[list[int]], pads: Sequence[int]) -> bool:
    """Whether computing rows apart takes clearly fewer tokens than one forward over all missing columns."""
    with store.lock:
        known = [store.index.match(key, text).length for text in texts]
    columns = pads[0] + len(texts[0])
    together = len(texts) * (columns - min(pad + n for pad, n in zip(pads, known, strict=True)))
    planned: Trie = {}
    missing = []
    for text, length in zip(texts, known, strict=True):
        length = max(length, _shared_length(planned, text, store.block_size))
        missing.append(len(text) - length)
        _plan(planned, text, store.block_size)
    apart = sum(len(group) * missing[group[0]] for group in _groups(missing)) + len(texts)
    return together - apart >= max(_WORTHWHILE, together // 8)


def _compute_round(
    store: "PrefixStore", key: Hashable, texts: Sequence[list[int]], device: torch.device, chunk_size: int
) -> list[PrefixSharedCache]:
    """Compute the rest of every row that shares no further block with one computed now; empty where none is left."""
    planned: Trie = {}
    chosen: list[int] = []
    with store.lock:
        matches = [store.index.match(key, text) for text in texts]
        for i, (text, match) in enumerate(zip(texts, matches, strict=True)):
            whole = match.length - match.length % store.block_size
            if match.length < len(text) and _shared_length(planned, text, store.block_size) <= whole:
                chosen.append(i)
                _plan(planned, text, store.block_size)
    missing = [len(texts[i]) - matches[i].length for i in chosen]
    return [
        _compute(store, key, [texts[chosen[g]] for g in group], texts, device, chunk_size) for group in _groups(missing)
    ]


def _compute(
    store: "PrefixStore",
    key: Hashable,
    texts: Sequence[list[int]],
    all_texts: Sequence[list[int]],
    device: torch.device,
    chunk_size: int,
) -> PrefixSharedCache:
    """Bring the store to know `texts`, in forwards over all of them; others of `all_texts` begin like these."""
    cache = PrefixSharedCache(store)
    with store.lock:
        matches = [store.index.match(key, text) for text in texts]
        columns = max(match.length for match in matches)
        rows = _taken(store, matches, [match.length for match in matches])
        cache.fill(rows, [columns - match.length for match in matches], columns)
    held = [match.length for match in matches]
    parting = [{*match.wanted, *_parting(texts, i, all_texts, store.block_size)} for i, match in enumerate(matches)]
    while any(n < len(text) for n, text in zip(held, texts, strict=True)):
        parts = [text[n : n + chunk_size] for n, text in zip(held, texts, strict=True)]
        ends = [n + len(part) for n, part in zip(held, parts, strict=True)]
        cache.pin(
            [
                {*blocks, *read_behind(end, store.block_size), end // store.block_size}
                for blocks, end in zip(parting, ends, strict=True)
            ]
        )
        _forward(store, cache, parts, held, device)
        held = ends
        cache.crop_rows(held)
    with store.lock:
        tables, _ = cache.rows_held(is_prompt_whole=True)
        for i, text in enumerate(texts if cache.is_current else ()):
            exact = cache.exact_blocks[i] if cache.exact_blocks else ()
            store.index.insert(key, text, [table_rows[i] for table_rows in tables], exact)
    return cache


def _parting(texts: Sequence[list[int]], i: int, others: Sequence[list[int]], block_size: int) -> set[int]:
    """The blocks of text i that other texts of the batch, which go on elsewhere, read exact there."""
    found: set[int] = set()
    for other in others:
        shared = next((n for n, (a, b) in enumerate(zip(texts[i], other, strict=False)) if a != b), None)
        if shared is not None:
            found.update(read_behind(shared, block_size))
    return found


@torch.no_grad()
def _forward(
    store: "PrefixStore",
    cache: PrefixSharedCache,
    parts: Sequence[list[int]],
    held: Sequence[int],
    device: torch.device,
) -> None:
    """One forward of unlike many new tokens a row, the shorter ones followed by tokens of no meaning."""
    model = store.model
    assert model is not None
    longest, columns = max(map(len, parts)), cache.get_seq_length()
    ids = torch.tensor([part + [0] * (longest - len(part)) for part in parts], device=device)
    lengths = torch.tensor(held, device=device)[:, None]
    new = torch.tensor([len(part) for part in parts], device=device)
    mask = torch.arange(columns + longest, device=device) >= columns - lengths
    extras: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        extras["logits_to_keep"] = 1
    model(
        input_ids=ids,
        attention_mask=mask.long() if not bool(mask.all()) else None,
        # Not beyond a row's own: a table of positions may end there.
        position_ids=lengths + torch.arange(longest, device=device).minimum(new[:, None] - 1).clamp(min=0),
        use_cache=True,
        **{compat.cache_keyword(model): cache},
        **extras,
    )


def _taken(store: "PrefixStore", matches: Sequence[Match], lengths: Sequence[int]) -> list[list[list[int]]]:
    """For each block space the blocks of the first `lengths[i]` tokens of every match, retained."""
    size = store.block_size
    cut = [Match(match.nodes[: -(-length // size)], length) for match, length in zip(matches, lengths, strict=True)]
    taken = [store.index.take(match) for match in cut]
    return [[rows[space] for rows in taken] for space in range(len(store.allocators))]


def _groups(missing: Sequence[int]) -> list[list[int]]:
    """Indices in groups for one forward each, none of which computes twice what a row lacks; longest rows first."""
    groups: list[list[int]] = []
    for i in sorted((i for i, n in enumerate(missing) if n > 0), key=lambda i: -missing[i]):
        if groups and 2 * missing[i] >= missing[groups[-1][0]]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _plan(planned: Trie, text: Sequence[int], block_size: int) -> None:
    for start in range(0, len(text) - block_size + 1, block_size):
        planned = planned.setdefault(tuple(text[start : start + block_size]), {})


def _shared_length(planned: Trie, text: Sequence[int], block_size: int) -> int:
    """Tokens of the whole blocks that `text` begins with and a planned text too."""
    for start in range(0, len(text) - block_size + 1, block_size):
        found = planned.get(tuple(text[start : start + block_size]))
        if found is None:
            return start
        planned = found
    return len(text) // block_size * block_size
