"""Filling a batch where layers hold states: prompts are read up to where states are kept, and rows brought level.

    row 0    [ known to a checkpoint ][ to where texts part ]*[ to the last whole block ]*
    row 1    ----------[ known to a checkpoint ]*                 * states are kept here; generate() reads the rest

States sum up a text: unlike keys they are there for some lengths alone, and what a row reads must begin at one of them.
So the borders of what is read are those at which states are kept, and a prompt that comes again is read in the very
parts that it was read in before. Rows that would lack unlike many tokens are read up to their last one.

Rows of unlike length are read one after the other: padding behind a row would go into its states.
"""

import contextlib
import itertools
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch

from hf_kvopt.cache.states import RowStates
from hf_kvopt.errors import OutOfBlocks
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.exact import read_behind
from hf_kvopt.prefix.fill import CHUNK_TOKENS, WORTHWHILE_TOKENS, read_parts, taken
from hf_kvopt.prefix.index import Match
from hf_kvopt.prefix.shared_blocks import SharedBlocks
from hf_kvopt.prefix.texts import common_prefix


class Plan(NamedTuple):
    """Tokens at which the reading of one row stops: those where states are kept, and the last one."""

    borders: tuple[int, ...]
    stop: int

    def behind(self, length: int) -> "Plan":
        """Return what is left of it for a row that holds `length` tokens."""
        return Plan(tuple(border for border in self.borders if border > length), self.stop)


Ends = dict[int, tuple[PrefixSharedCache, int]]
"""Where the rows of a batch were read to the end of their plan: the cache, and the row of it."""


def fill_with_states(
    blocks: SharedBlocks, cache: PrefixSharedCache, device: torch.device, chunk_size: int | None
) -> list[int]:
    """Fill a cache that has begun; see `prefix.fill.fill_from`, whose arguments and result these are."""
    assert cache.texts is not None
    texts = [text[:-1] for text in cache.texts]  # the last token is generate()'s, which wants its logits
    with blocks.lock:
        spelled = [blocks.index.spell(cache.key, text).length for text in texts]
        known = [blocks.index.match(cache.key, text).length for text in texts]
    plans = _plans(blocks, cache, texts, spelled, known)
    ends: Ends = {}
    # Too small for the whole batch beside what is in use: go on with what is there.
    with contextlib.suppress(OutOfBlocks):
        waiting = [i for i, plan in enumerate(plans) if known[i] < plan.stop]
        while waiting:
            done = _read_round(blocks, cache.key, texts, plans, waiting, device, chunk_size or CHUNK_TOKENS)
            ends |= done
            waiting = [i for i in waiting if i not in done]
    with blocks.lock:
        _level(blocks, cache, texts, plans, ends)
    return known


def _plans(
    blocks: SharedBlocks,
    cache: PrefixSharedCache,
    texts: Sequence[list[int]],
    spelled: Sequence[int],
    known: Sequence[int],
) -> list[Plan]:
    """Plan where to stop in each row, of which `known[i]` tokens have states and `spelled[i]` keys."""
    size = blocks.block_size
    # What opens the answer, behind the last message of a chat, is often written otherwise in the turn after it.
    lasts = [max(0, len(text) + 1 - size // 2) // size * size for text in texts]
    is_level = len({pad + last for pad, last in zip(cache.pads, lasts, strict=True)}) == 1
    partings = _partings(texts)
    plans = []
    for i, text in enumerate(texts):
        borders: list[int] = []
        for border in sorted({n // size * size for n in (spelled[i], *partings[i])}):
            if border < lasts[i] and border - max((known[i], *borders)) >= WORTHWHILE_TOKENS:
                borders.append(border)
        borders += [lasts[i]] if lasts[i] else []
        plans.append(Plan(tuple(borders), lasts[i] if is_level else len(text)))
    return plans


def _partings(texts: Sequence[list[int]]) -> list[set[int]]:
    """Return for each text how many tokens it begins with as another one does, for each of the others."""
    order = sorted(range(len(texts)), key=lambda i: texts[i])
    common = [common_prefix(texts[a], texts[b]) for a, b in itertools.pairwise(order)]
    found: list[set[int]] = [set() for _ in texts]
    for place, i in enumerate(order):
        # In sorted order, two texts share the least of what the neighbours between them do.
        for neighbours in (common[place:], common[:place][::-1]):
            shared = neighbours[0] if neighbours else 0
            for count in neighbours:
                shared = min(shared, count)
                found[i].add(shared)
    return found


def _read_round(
    blocks: SharedBlocks,
    key: Hashable,
    texts: Sequence[list[int]],
    plans: Sequence[Plan],
    waiting: Sequence[int],
    device: torch.device,
    chunk_size: int,
) -> Ends:
    """Read rows of `waiting` to the end of their plans, but for those that begin with what another one reads now."""
    planned: set[tuple[int, ...]] = set()
    groups: dict[tuple[int, Plan], list[int]] = {}
    with blocks.lock:
        matches = {i: blocks.index.match(key, texts[i]) for i in waiting}
    for i in waiting:
        held = min(matches[i].length, plans[i].stop)
        plan = plans[i].behind(held)
        parts = {tuple(texts[i][:border]) for border in plan.borders}
        if not planned & parts:
            planned |= parts
            groups.setdefault((held, plan), []).append(i)
    ends: Ends = {}
    for (_, plan), rows in groups.items():
        part = _read(blocks, key, [texts[i] for i in rows], plan, device, chunk_size)
        ends |= {i: (part, row) for row, i in enumerate(rows)}
    return ends


def _read(
    blocks: SharedBlocks,
    key: Hashable,
    texts: Sequence[list[int]],
    plan: Plan,
    device: torch.device,
    chunk_size: int,
) -> PrefixSharedCache:
    """Read texts, of which equally many tokens are known, as one batch to the end of a plan; keep what it names."""
    cache, size = PrefixSharedCache(blocks), blocks.block_size
    with blocks.lock:
        spelled = [blocks.index.spell(key, text) for text in texts]
        places = [blocks.index.places(one, text) for one, text in zip(spelled, texts, strict=True)]
        held = max(length for length in set.intersection(*places) if length <= plan.stop)
        _take(blocks, cache, texts, spelled, [0] * len(texts), held, {})
    borders = sorted({border for border in (*plan.borders, plan.stop) if border > held})
    kept = {block for border in borders for block in read_behind(border, size)}
    for border in borders:
        while held < border:
            end = min(border, held + chunk_size)
            cache.pin([{*kept, *read_behind(end, size), end // size}] * len(texts))
            read_parts(blocks, cache, [text[held:end] for text in texts], [held] * len(texts), device)
            held = end
        with blocks.lock:
            _file(blocks, key, cache, texts, border, border in plan.borders)
    return cache


def _file(
    blocks: SharedBlocks,
    key: Hashable,
    cache: PrefixSharedCache,
    texts: Sequence[list[int]],
    length: int,
    is_border: bool,
) -> None:
    """Let the index know what a cache holds of texts, and at a border its states."""
    tables, _ = cache.rows_held(is_prompt_whole=True)
    for row, text in enumerate(texts if cache.is_current else ()):
        exact = cache.exact_blocks[row] if cache.exact_blocks else ()
        blocks.index.insert(key, text[:length], [table_rows[row] for table_rows in tables], exact)
        if is_border:
            blocks.index.keep_states(key, text[:length], cache.states_of(row))


def _level(
    blocks: SharedBlocks, cache: PrefixSharedCache, texts: Sequence[list[int]], plans: Sequence[Plan], ends: Ends
) -> None:
    """Fill all rows up to the last column at which each of them has states."""
    spelled = [blocks.index.spell(cache.key, text) for text in texts]
    lengths = [blocks.index.places(one, text) for one, text in zip(spelled, texts, strict=True)]
    for i in ends:
        lengths[i] |= {plans[i].stop} if spelled[i].length >= plans[i].stop else set()
    rows = list(zip(cache.pads, lengths, strict=True))
    candidates = {pad + length for pad, some in rows for length in some}
    columns = max((column for column in candidates if all(column - pad in some for pad, some in rows)), default=0)
    _take(blocks, cache, texts, spelled, cache.pads, columns if columns > 1 else 0, ends)
    # The same prompt may come again, or another one that parts from it.
    size = blocks.block_size
    pins = [{block for n in some for block in read_behind(n, size)} for some in lengths]
    cache.pin([{*kept, *read_behind(len(text), size)} for kept, text in zip(pins, texts, strict=True)])


def _take(
    blocks: SharedBlocks,
    cache: PrefixSharedCache,
    texts: Sequence[list[int]],
    spelled: Sequence[Match],
    pads: Sequence[int],
    columns: int,
    ends: Ends,
) -> None:
    """Fill a cache with the known blocks of each row up to a column, and the states there."""
    counts = [max(0, columns - pad) for pad in pads]
    states: list[RowStates | None] = []
    for i, (text, count) in enumerate(zip(texts, counts, strict=True)):
        found = blocks.index.states_at(spelled[i], text, count) if count else None
        if found is None and count:
            part, row = ends[i]
            found = part.states_of(row)
        states.append(found)
    cache.fill(taken(blocks, spelled, counts), pads, columns, states)
