"""FreeRuns: the free blocks of a block space, kept as maximal runs of neighbours."""

from collections.abc import Iterable, Mapping, Sequence

from hf_kvopt.errors import KVOptError


class FreeRuns:
    """Which blocks are free. Between calls no two runs touch.

    Args:
        blocks: that are free now, in rising order.
    """

    def __init__(self, blocks: Iterable[int] = ()) -> None:
        self.ends: dict[int, int] = {}  # start of a run -> one past its end
        self._starts: dict[int, int] = {}  # the same runs, by their end
        self.num_free = 0
        for block in blocks:
            self.give(block)

    def longest(self) -> int:
        """Return the start of the longest run; there must be one."""
        return max(self.ends, key=lambda start: self.ends[start] - start)

    def room_behind(self, block: int) -> int:
        """Return how many blocks right behind this one are free."""
        return self.ends.get(block + 1, block + 1) - (block + 1)

    def take(self, start: int, end: int) -> list[int]:
        """Cut [start, end) out of the run that contains it."""
        run_start = start if start in self.ends else max(s for s in self.ends if s <= start)
        run_end = self.ends.pop(run_start)
        del self._starts[run_end]
        for lo, hi in ((run_start, start), (end, run_end)):
            if lo < hi:
                self.ends[lo], self._starts[hi] = hi, lo
        self.num_free -= end - start
        return list(range(start, end))

    def give(self, block: int) -> None:
        """Put a block back, joining the runs on its two sides."""
        start, end = block, block + 1
        if start in self._starts:
            start = self._starts.pop(start)
        if end in self.ends:
            end = self.ends.pop(end)
        self.ends[start], self._starts[end] = end, start
        self.num_free += 1

    def check(self, refcounts: Sequence[int], held: Mapping[int, int]) -> None:
        """Raise KVOptError unless `refcounts` say how often each block is `held`, and the others are here."""
        wrong = [block for block, count in enumerate(refcounts) if count != held.get(block, 0)]
        free = {block for start, end in self.ends.items() for block in range(start, end)}
        zero = {block for block, count in enumerate(refcounts) if count == 0}
        if wrong or free != zero or len(free) != self.num_free:
            raise KVOptError(
                f"block accounting is broken: {wrong = }, free runs hold {len(free)} blocks, {len(zero)} have no "
                f"holder, num_free is {self.num_free}"
            )
