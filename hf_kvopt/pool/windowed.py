"""Sliding windows of a block table: which columns a step can do without."""

from hf_kvopt.pool.allocator import BlockAllocator


class Windowed:
    """The part of a `BlockTable` that knows its window."""

    allocator: BlockAllocator
    window: int | None
    record_past: bool
    keeps_all: bool

    @property
    def _drops_past(self) -> bool:
        return not (self.record_past or self.keeps_all)

    @property
    def _starts_in_window(self) -> bool:
        """Return whether a step begins with what it leaves behind; sealed blocks begin with whole ones of a row."""
        return self._drops_past and self.window is not None and self.allocator.tails is None

    def replaces_window(self, num_tokens: int) -> bool:
        """Return whether a step of `num_tokens` leaves nothing of what is held now, so that it starts on new blocks."""
        return self._starts_in_window and self.window is not None and num_tokens >= self.window

    def visible_start(self, clock: int) -> int:
        """First column that queries from column `clock` on are given: the mask's kv offset.

        Not a token more than the window has, as some models slide by what their cache hands out alone.
        """
        return 0 if self.window is None else max(0, clock - self.window + 1)
