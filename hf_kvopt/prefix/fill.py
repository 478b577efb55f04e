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
from typing import Any, NamedTuple

import torch

from hf_kvopt import compat
from hf_kvopt.errors import OutOfBlocks
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.exact import columns_in_common, lengths_to_go_on_from, read_behind
from hf_kvopt.prefix.index import Match
from hf_kvopt.prefix.shared_blocks import SharedBlocks

# A forward of its own must save this many tokens, and an eighth of the batch's.
WORTHWHILE_TOKENS = 32
CHUNK_TOKENS = 2048
Trie = dict[tuple[int, ...], Any]


def fill_from(
    blocks: SharedBlocks, cache: PrefixSharedCache, device: torch.device, chunk_size: int | None
) -> list[int]:
    """Fill a cache that has begun as far as what is known, and worthwhile forwards of its own, allow.

    Returns:
        How many tokens of each prompt were known before.
    """
    assert cache.texts is not None
    texts = [text[:-1] for text in cache.texts]  # the last token is generate()'s, which wants its logits
    computed: list[PrefixSharedCache] = []  # held, so that the next round evicts nothing of them
    with blocks.lock:
        matches = [blocks.index.match(cache.key, text) for text in texts]
        known = [match.length for match in matches]
        is_apart = blocks.model is not None and len(texts) > 1 and _is_worthwhile(blocks, texts, cache.pads, known)
        if not is_apart:
            _level(blocks, cache, matches)
            return known
    # Too small for the whole batch beside what is in use: go on with what is there.
    with contextlib.suppress(OutOfBlocks):
        while done := _compute_round(blocks, cache.key, texts, device, chunk_size or CHUNK_TOKENS):
            computed += done
    with blocks.lock:
        _level(blocks, cache, [blocks.index.match(cache.key, text) for text in texts])
    return known


def _level(blocks: SharedBlocks, cache: PrefixSharedCache, matches: Sequence[Match]) -> None:
    """Fill all rows up to the column that the least known one reaches."""
    columns = min(pad + match.length for pad, match in zip(cache.pads, matches, strict=True))
    size = blocks.block_size
    if blocks.index.is_sealed:
        columns = columns_in_common(
            cache.pads, [lengths_to_go_on_from(match.nodes, match.length, size) for match in matches]
        )
    columns = columns if columns > 1 else 0
    rows = taken(blocks, matches, [max(0, columns - pad) for pad in cache.pads])
    cache.fill(rows, cache.pads, columns)
    # The same prompt may come again; its last token is generate()'s.
    texts = cache.texts or []
    cache.pin([{*match.wanted, *read_behind(len(text) - 1, size)} for match, text in zip(matches, texts, strict=True)])


def _is_worthwhile(blocks: SharedBlocks, texts: Sequence[list[int]], pads: Sequence[int], known: Sequence[int]) -> bool:
    """Return whether computing rows apart takes clearly fewer tokens than one forward over all missing columns."""
    columns = pads[0] + len(texts[0])
    together = len(texts) * (columns - min(pad + n for pad, n in zip(pads, known, strict=True)))
    planned: Trie = {}
    missing = []
    for text, length in zip(texts, known, strict=True):
        length = max(length, _shared_length(planned, text, blocks.block_size))
        missing.append(len(text) - length)
        _plan(planned, text, blocks.block_size)
    apart = sum(len(group) * missing[group[0]] for group in _groups(missing)) + len(texts)
    return together - apart >= max(WORTHWHILE_TOKENS, together // 8)


def _compute_round(
    blocks: SharedBlocks, key: Hashable, texts: Sequence[list[int]], device: torch.device, chunk_size: int
) -> list[PrefixSharedCache]:
    """Compute the rest of every row that shares no further block with one computed now; empty where none is left."""
    planned: Trie = {}
    chosen: list[int] = []
    parts: list[Part] = []
    with blocks.lock:
        matches = [blocks.index.match(key, text) for text in texts]
        for i, (text, match) in enumerate(zip(texts, matches, strict=True)):
            whole = match.length - match.length % blocks.block_size
            if match.length < len(text) and _shared_length(planned, text, blocks.block_size) <= whole:
                chosen.append(i)
                _plan(planned, text, blocks.block_size)
        for group in _groups([len(texts[i]) - matches[i].length for i in chosen]):
            rows = [chosen[g] for g in group]
            parts.append(_begin(blocks, [texts[i] for i in rows], [matches[i] for i in rows], texts))
    for part in parts:
        _compute(blocks, key, part, device, chunk_size)
    return [part.cache for part in parts]


class Part(NamedTuple):
    """Rows that are computed together: their texts, the cache that holds what is known of them, and how much."""

    texts: list[list[int]]
    cache: PrefixSharedCache
    held: list[int]
    pins: list[set[int]]  # blocks of each row that other texts will read exact


def _begin(
    blocks: SharedBlocks, texts: list[list[int]], matches: Sequence[Match], all_texts: Sequence[list[int]]
) -> Part:
    """Make a cache with what is known of `texts`, each row up to where its match ends; `all_texts` begin like these."""
    cache = PrefixSharedCache(blocks)
    held = [match.length for match in matches]
    columns = max(held)
    cache.fill(taken(blocks, matches, held), [columns - n for n in held], columns)
    size = blocks.block_size
    pins = [{*match.wanted, *_parting(text, all_texts, size)} for text, match in zip(texts, matches, strict=True)]
    return Part(texts, cache, held, pins)


def _compute(blocks: SharedBlocks, key: Hashable, part: Part, device: torch.device, chunk_size: int) -> None:
    """Bring the index to know the texts of `part`, in forwards over all of them."""
    texts, cache, held, pins = part
    size = blocks.block_size
    while any(n < len(text) for n, text in zip(held, texts, strict=True)):
        new = [text[n : n + chunk_size] for n, text in zip(held, texts, strict=True)]
        ends = [n + len(tokens) for n, tokens in zip(held, new, strict=True)]
        cache.pin([{*kept, *read_behind(n, size), n // size} for kept, n in zip(pins, ends, strict=True)])
        read_parts(blocks, cache, new, held, device)
        held = ends
        cache.crop_rows(held)
    with blocks.lock:
        tables, _ = cache.rows_held(is_prompt_whole=True)
        for i, text in enumerate(texts if cache.is_current else ()):
            exact = cache.exact_blocks[i] if cache.exact_blocks else ()
            blocks.index.insert(key, text, [table_rows[i] for table_rows in tables], exact)


def _parting(text: list[int], others: Sequence[list[int]], block_size: int) -> set[int]:
    """The blocks of a text that other texts of the batch, which go on elsewhere, read exact there."""
    found: set[int] = set()
    for other in others:
        shared = next((n for n, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), None)
        if shared is not None:
            found.update(read_behind(shared, block_size))
    return found


@torch.no_grad()
def read_parts(
    blocks: SharedBlocks,
    cache: PrefixSharedCache,
    parts: Sequence[list[int]],
    held: Sequence[int],
    device: torch.device,
) -> None:
    """One forward of unlike many new tokens a row, the shorter ones followed by tokens of no meaning."""
    model = blocks.model
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


def taken(blocks: SharedBlocks, matches: Sequence[Match], lengths: Sequence[int]) -> list[list[list[int]]]:
    """For each block space the blocks of the first `lengths[i]` tokens of every match, retained."""
    size = blocks.block_size
    cut = [Match(match.nodes[: -(-length // size)], length) for match, length in zip(matches, lengths, strict=True)]
    taken = [blocks.index.take(match) for match in cut]
    return [[rows[space] for rows in taken] for space in range(len(blocks.allocators))]


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
