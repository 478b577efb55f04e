"""Mark: what a cache holds now, so that a call that fails later can put all of it back.

    Mark(cache) ─► forwards, accepted drafts, rows repeated ─► an exception ─► mark.restore()

Tokens that are appended leave those before them alone, so lengths are enough to go back to. Two things are not left
alone: what slides out of a window, and rows so young that their keys may be stored anew around another centre. Of
these the mark holds the blocks, unless the pool is capped: there they might be the ones that the call lacks.
"""

import copy

from hf_kvopt.cache.fixed import FixedLayer
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.recording import state_layers
from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.quant import CENTRE_TOKENS

_CONTAINERS = ("_rows", "layers")


class Mark:
    """State of a cache that `restore` goes back to; `release` ends it.

    Args:
        cache: all its layers are paged ones, or hold states.
    """

    def __init__(self, cache: PagedCache) -> None:
        self.cache = cache
        # What derived caches know of their prompt lies beside the tables, and is replaced, never changed.
        self._attributes = {name: value for name, value in vars(cache).items() if name not in _CONTAINERS}
        layers = cache._paged_layers()
        self._is_new = not any(layer.is_initialized for layer in layers)
        self._clocks = [layer.clock for layer in layers]
        self._fixed = [layer for layer in layers if isinstance(layer, FixedLayer)]
        self._lengths = [layer.length.clone() for layer in self._fixed]
        self._states = [(layer, [layer.copy_of(i) for i in layer.conv_states]) for layer in state_layers(cache) or []]
        self._log = copy.copy(cache._log)
        learns = any(_has_centre(layer) for layer in layers)
        self._is_young = learns and bool(self._lengths) and 0 < int(self._lengths[0]) < CENTRE_TOKENS
        self._tables = [] if self._lengths else [_TableMark(table, learns) for table in cache._tables.values()]

    def restore(self) -> bool:
        """Put everything back; where that cannot be done, empty the cache and return False."""
        cache = self.cache
        if self._is_new:
            cache.free()
            if cache._makes_layers:
                del cache.layers[len(self._clocks) :]
        elif not self._restore_tokens():
            cache.free()
            return False
        for name, value in self._attributes.items():
            setattr(cache, name, value)
        cache._log = self._log
        for layer, states in self._states:
            for idx, state in enumerate(states):
                layer.put(idx, state)
        return True

    def release(self) -> None:
        """Give back the blocks that are held, and let windows slide as they did before."""
        for mark in self._tables:
            mark.release()

    def _restore_tokens(self) -> bool:
        cache = self.cache
        for fixed, length in zip(self._fixed, self._lengths, strict=True):
            fixed.set_length(length)
        if self._lengths:
            return not self._is_young
        try:
            for mark in self._tables:
                mark.restore()
        except CacheStateError:
            return False
        marked = [mark.table for mark in self._tables]
        for table in cache._tables.values():
            if not any(table is other for other in marked):
                table.clear()
        for i, layer in enumerate(cache._paged_layers()):
            layer.clock = self._clocks[i] if i < len(self._clocks) else 0
        return True


class _TableMark:
    """Rows of one table; holds a reference on each of their blocks where these would not stay as they are."""

    def __init__(self, table: BlockTable, learns: bool) -> None:
        self.table, self.lags, self.clock, self.record_past = table, list(table.lags), table.clock, table.record_past
        self.is_young = learns and any(0 < length < CENTRE_TOKENS for length in table.lengths)
        slides = table.window is not None and not table.keeps_all
        has_room = table.allocator.max_blocks is None
        self.held = table.fork() if table.rows and (slides or self.is_young) and has_room else None

    def restore(self) -> None:
        """Let the table have these rows again.

        Raises:
            CacheStateError: blocks of them are gone, or may hold something else.
        """
        table = self.table
        with table.allocator.lock:
            if self.held is not None:
                table.take_over(self.held)
            elif self.is_young and table.clock > self.clock:
                raise CacheStateError("rows of so few tokens may be stored anew: got more tokens behind them")
            else:
                table.restore(self.lags, self.clock)
            # An interrupt in the middle of a change leaves blocks to nobody.
            table.allocator.recount()

    def release(self) -> None:
        """Give the references back."""
        self.table.record_past = self.record_past
        if self.held is not None:
            self.held.clear()
            self.held = None


def _has_centre(layer: PagedLayer) -> bool:
    return layer.pool is not None and layer.pool.keys.centres is not None
