"""What a user can set, as frozen objects that work with their defaults and refuse what cannot work."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CacheConfig:
    """How a paged cache lays out and limits its memory.

    Args:
        block_size: tokens a block, a power of two from 16 to 256. Smaller wastes less at the end of each row.
        max_tokens: hard cap on the tokens held over all rows of the batch, rounded up to blocks; None grows as needed.
        compileable: fixed capacity with lengths on the device, so that `generate()` compiles the decode step; needs
            `max_tokens`, which is then the capacity over all rows. Off by default, because transformers compiles
            every plain `generate` whose cache says that it can be.

    Raises:
        ValueError: a value cannot work; the message says what would.

    Source: blocks as in PagedAttention, arXiv:2309.06180; compiling without recompiling, transformers issue #30055.
    """

    block_size: int = 16
    max_tokens: int | None = None
    compileable: bool = False

    def __post_init__(self) -> None:
        size = self.block_size
        if not isinstance(size, int) or isinstance(size, bool) or not 16 <= size <= 256 or size & (size - 1):
            raise ValueError(f"block_size must be a power of two from 16 to 256: got {size!r}")
        cap = self.max_tokens
        if cap is not None and (not isinstance(cap, int) or isinstance(cap, bool) or cap < 1):
            raise ValueError(f"max_tokens must be a positive number of tokens, or None for no cap: got {cap!r}")
        if self.compileable and self.max_tokens is None:
            raise ValueError(
                "compileable=True needs max_tokens, the fixed capacity over all rows: got None; pass "
                "max_tokens=batch_size * (prompt tokens + max_new_tokens)"
            )

    @property
    def max_blocks(self) -> int | None:
        """`max_tokens` in blocks."""
        return None if self.max_tokens is None else -(-self.max_tokens // self.block_size)
