"""ChunkedTable: a block table whose chunks shrink one after the other, each once the chunk behind it was read.

    chunk 1     [a b c d e f]
    chunk 2     [a b c d e f][g h i j k l]            its queries choose of chunk 1
    chunk 3     [a d f][g h i j k l][m n o p q r]     its queries choose of chunk 2
    decoding    [a d f][g k l][m n o p q r] s t u     the newest chunk is whole, and what is generated joins it

A chunk is a forward of several tokens a row. Which token stands in a slot differs by head, as in `ScoredTable`.
"""

from collections.abc import Sequence

from torch import Tensor

from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.evicting import Eviction
from hf_kvopt.pool.scored import ScoredTable


class ChunkedTable(ScoredTable):
    """Table of a policy that shrinks chunks; see `ScoredTable` for the rest.

    Between calls: of the tokens that row i holds, those before `settled[i]` are of chunks that were shrunk, and those
    from `newest[i]` on are of the last chunk; what lies between is shrunk when the next forward begins.
    """

    settled: list[int]
    newest: list[int]
    _floors_before: list[int]  # what could not be cut before the last forward chose

    def _forget(self) -> None:
        super()._forget()
        self.settled, self.newest, self._floors_before = [], [], []

    def has_chosen(self, reads: object) -> bool:
        return reads in self.choices

    def to_shrink(self, row: int, num_tokens: int) -> range:
        settled, newest = (marks[row] if marks else 0 for marks in (self.settled, self.newest))
        return range(settled, min(newest, num_tokens))

    def choose(self, reads: object, rows: Sequence[Tensor], states: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        if not self.choices:
            self._floors_before = list(self.floors)
        super().choose(reads, rows, states)

    def rollback(self, clock: int) -> None:
        self._take_back(clock)
        super().rollback(clock)

    def select(self, indices: Sequence[int]) -> None:
        self._floors_before = [self._floors_before[i] for i in indices] if self._floors_before else []
        self.settled, self.newest = ([marks[i] for i in indices] if marks else [] for marks in self._marks)
        super().select(indices)

    def fork(self) -> BlockTable:
        child = super().fork()
        assert isinstance(child, ChunkedTable)
        child._floors_before = list(self._floors_before)
        child.settled, child.newest = (list(marks) for marks in self._marks)
        return child

    @property
    def _marks(self) -> tuple[list[int], list[int]]:
        return self.settled, self.newest

    def _crop_to(self, lags: Sequence[int], clock: int) -> None:
        self._require_held(lags, clock)
        self._take_back(clock)
        super()._crop_to(lags, clock)

    def _require_held(self, lags: Sequence[int], clock: int) -> None:
        floors = self.floors
        self.floors = self._floors_before if self.choices and clock <= self.step_start else floors
        try:
            super()._require_held(lags, clock)
        finally:
            self.floors = floors

    def _take_back(self, clock: int) -> None:
        """Forget what the last forward chose, where it is taken back as a whole."""
        if self.choices and clock <= self.step_start:
            self.choices, self.states, self.floors, self._plan = {}, {}, self._floors_before, None

    def _evict(self, num_tokens: int) -> None:
        super()._evict(num_tokens)
        held = [self._num_held(row) - pads for row, pads in enumerate(self.padding())]
        newest = [min(pair) for pair in zip(self.newest or [0] * len(held), held, strict=True)]
        # A chunk that was taken back, or refused, is read again: the one before it still waits.
        if num_tokens > 1 and newest != held:
            self.settled, self.newest = newest, held

    def _drop(self, eviction: Eviction, pads: Sequence[int]) -> None:
        before = self.shrunk or [0] * self.batch_size
        super()._drop(eviction, pads)
        self.newest = [mark - gone for mark, gone in zip(self.newest, self.shrunk, strict=True)]
        self.settled = list(self.newest)
        self.shrunk = [a + b for a, b in zip(before, self.shrunk, strict=True)]
