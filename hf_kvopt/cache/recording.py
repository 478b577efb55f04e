"""Recording of drafts: what a cache keeps so that tokens that were only tried can be taken back.

begin ─► forwards, `keep_paths` ─► end        sliding windows keep what lies behind them, states a copy a token
"""

from collections.abc import Iterator
from contextlib import contextmanager

from hf_kvopt.cache.bounded import forbid
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.states import StateLayer


def state_layers(cache: PagedCache) -> list[StateLayer] | None:
    """Return the layers whose states are copied for each token; None where a layer holds what cannot be."""
    layers = cache._stock_layers()
    if cache._rows.is_fixed and layers:
        return None
    return layers if all(isinstance(layer, StateLayer) for layer in layers) else None


def begin(cache: PagedCache) -> None:
    """Keep what is needed to take tokens back, until `end`; an eviction policy makes it raise CacheStateError."""
    forbid(cache.policy, "drafts are read several tokens at a time and taken back")
    for table in cache._rows.tables.values():
        table.record_past = table.window is not None
    layers = state_layers(cache) or []
    for layer in layers:
        layer.history = {}
    cache.records_states = bool(layers)


def end(cache: PagedCache) -> None:
    """Keep no more copies of states."""
    cache.records_states = False
    for layer in state_layers(cache) or []:
        layer.history = None


def undo(cache: PagedCache) -> None:
    """Put states back to what they were before a forward that broke off, whose keys were taken back."""
    if cache.records_states:
        for layer in state_layers(cache) or []:
            layer.rewind()
        if cache._log is not None:
            cache._log.take_back()


@contextmanager
def paused(cache: PagedCache) -> Iterator[None]:
    """Read a text that stays: as a whole, and without copies."""
    was, cache.records_states = cache.records_states, False
    try:
        yield
    finally:
        cache.records_states = was
