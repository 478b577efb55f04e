"""Unevicted: the answers of a block table without an eviction policy to what attention and statistics ask of any."""

from collections.abc import Sequence

from torch import Tensor

from hf_kvopt.eviction.policy import EvictionPolicy
from hf_kvopt.pool.windowed import Windowed


class Unevicted(Windowed):
    """Base of tables that keep every token; `EvictingTable` and `ScoredTable` answer otherwise."""

    policy: EvictionPolicy | None = None
    evicted = 0  # tokens that the policy dropped, over all rows

    def next_start(self, clock: int) -> int:
        """Return `visible_start` for the forward that begins at `clock`, before any layer of it was written."""
        return self.visible_start(clock)

    def note_padding(self, hidden: Sequence[int]) -> None:
        """Learn how many of the columns that are handed out now each row begins with are padding."""

    def padding(self) -> list[int]:
        """Return how many slots of noted padding each row begins with."""
        raise NotImplementedError

    def has_chosen(self, reads: object) -> bool:
        """Tell whether the layer of `reads` need not choose any more what it keeps of a prompt."""
        return True

    def to_shrink(self, row: int, num_tokens: int) -> range:
        """Return which of the `num_tokens` tokens that a row holds, behind its padding, are to be chosen of now."""
        return range(num_tokens)

    def choose(self, reads: object, rows: Sequence[Tensor], states: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        """Take note of what the layer of `reads` keeps of a prompt.

        Args:
            reads: of the layer.
            rows: one [num_kv_heads, count] of tokens a row.
            states: where the layer seals its blocks, the keys and values of these tokens as they came, a pair of
                [num_kv_heads, count, head_dim] a row.
        """
