"""BatchCache: a cache of a prefix store whose rows join and leave one by one."""

from collections.abc import Sequence

from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool import ragged
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.prefix.cache import PrefixSharedCache


class BatchCache(PrefixSharedCache):
    """Rows of a running batch; belongs to no prompt, so that tokens come in any portions."""

    @property
    def tables(self) -> list[BlockTable]:
        """The tables, in the order of the store's allocators."""
        return list(self._tables.values())

    def join(self, other: "BatchCache") -> None:
        """Take the rows of `other`, a cache of the same store, behind those that are held, and close it.

        Both belong to no prompt (see `open_row`), and a forward has written all rows of `other` to the end.

        Raises:
            CacheStateError: the model computes in another dtype, or on another device, than for the rows held.
        """
        with self.blocks.lock:
            pairs = list(zip(self._paged_layers(), other._paged_layers(), strict=True))
            if self.num_rows and any(mine.pool is not theirs.pool for mine, theirs in pairs):
                raise CacheStateError(
                    "rows of one batch are computed alike: got rows in another dtype or on another device than those "
                    "that are held; let the batch end before the model changes"
                )
            for mine, theirs in pairs:
                mine.follow(theirs)
            for table, joined in zip(self._tables.values(), other._tables.values(), strict=True):
                ragged.join(table, joined)
            self._end_together()
            other.close()

    def claim(self, num_tokens: int) -> None:
        """Make room for tokens of each row that a step writes by itself, and count them as written.

        Raises:
            OutOfBlocks: the cap is reached.
        """
        with self.blocks.lock:
            for layer in self._paged_layers():
                layer.claim(self.num_rows, num_tokens)
                layer.num_new = num_tokens
                if layer.pool is not None and layer.pool.keys.centres is not None:
                    layer.pool.keys.centres.go_on(layer.table)
            self._seen = self.get_seq_length()

    def keep_rows(self, rows: Sequence[int]) -> None:
        """Let row i be what row `rows[i]` was; the blocks of the others, and columns that no row has, go."""
        with self.blocks.lock:
            if rows:
                self._select(rows)
                self.close_up()
            else:
                super().reset()
                self._seen = 0

    def release_behind(self) -> None:
        """Give back what no row looks at any more, as it lies behind its window."""
        with self.blocks.lock:
            for table in self.tables:
                ragged.release_behind(table)

    def close_up(self) -> None:
        """Let columns go that no row has a token in."""
        if self.num_rows and all(min(table.lags) for table in self.tables):
            self.keep_paths(0, [[]] * self.num_rows)

    def _end_together(self) -> None:
        """Let all layers that were ever written stand where their tables end."""
        for layer in self._paged_layers():
            if layer.pool is not None and layer.in_step:
                layer.clock = layer.table.clock
        self._seen = self.get_seq_length()
