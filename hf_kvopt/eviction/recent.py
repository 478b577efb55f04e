"""Sinks and recent tokens: what keeps a model fluent on a text without end (StreamingLLM, arXiv:2309.17453).

    SinkRecent            [ sinks ]                                        [ recent ]
    SinkRecentPeriodic    [ sinks ]     [ ]         [ ]         [ ]        [ recent ]
                                        one block in each stretch of `every` tokens

Softmax needs somewhere to put weight that no token earns, and models learn to put it on the first ones: without these
a text falls apart as soon as they slide out. Periodic blocks are the strided pattern of Sparse Transformers
(arXiv:1904.10509).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from hf_kvopt.config import parse_tokens
from hf_kvopt.eviction.policy import EvictionPolicy


@dataclass(frozen=True)
class SinkRecent(EvictionPolicy):
    """Keep the first `sinks` and the newest `recent` tokens of each row; memory stays flat on a text without end.

    Args:
        sinks: tokens from the start on, 0 or more; rounded up to whole blocks.
        recent: newest tokens, such as 1024 or "1k": at least one block. Up to one block more is held, because whole
            blocks are dropped.

    Keys stay as they were stored, at the position that the token has in the text. See docs/guides/bounded-memory.md
    for what that means beyond the length that a model was trained for.

    Raises:
        ValueError: numbers that cannot work.

    Source: StreamingLLM, arXiv:2309.17453, without moving positions; transformers issues #38312, #35381.

    Examples:
        >>> from hf_kvopt import enable
        >>> model = enable(model, cache="int8", policy=SinkRecent(sinks=4, recent="1k"))
    """

    sinks: int = 4
    recent: int | str = 1024

    def __post_init__(self) -> None:
        _check_sinks(self.sinks)
        object.__setattr__(self, "recent", parse_tokens(self.recent, "recent"))

    def after_step(self, length: int) -> Sequence[range]:
        return [range(self.sinks, max(self.sinks, length - cast(int, self.recent)))]

    def check(self, block_size: int) -> None:
        _check_recent(cast(int, self.recent), block_size)


@dataclass(frozen=True)
class SinkRecentPeriodic(EvictionPolicy):
    """Keep sinks and recent tokens, and the block that holds every `every`-th token of what lies between.

    Memory grows by one block in `every` tokens: 16 times slower than a whole cache at the defaults and blocks of 16.

    Args:
        sinks: see `SinkRecent`.
        recent: see `SinkRecent`.
        every: tokens from one kept block to the next, such as 256 or "1k": at least two blocks.

    Raises:
        ValueError: numbers that cannot work.

    Source: strided attention of Sparse Transformers, arXiv:1904.10509, beside the sinks of arXiv:2309.17453.
    """

    sinks: int = 4
    recent: int | str = 1024
    every: int | str = 256

    def __post_init__(self) -> None:
        _check_sinks(self.sinks)
        object.__setattr__(self, "recent", parse_tokens(self.recent, "recent"))
        object.__setattr__(self, "every", parse_tokens(self.every, "every"))

    def after_step(self, length: int) -> Sequence[range]:
        every, stop = cast(int, self.every), length - cast(int, self.recent)
        gaps = (range(max(self.sinks, kept + 1), min(stop, kept + every)) for kept in range(0, max(0, stop), every))
        return [gap for gap in gaps if gap]

    def check(self, block_size: int) -> None:
        _check_recent(cast(int, self.recent), block_size)
        if cast(int, self.every) < 2 * block_size:
            raise ValueError(
                f"every must be at least two blocks of {block_size} tokens, or nothing lies between kept blocks: got "
                f"{self.every}; raise it to {2 * block_size} or more, or lower block_size"
            )


def _check_sinks(sinks: object) -> None:
    if not isinstance(sinks, int) or isinstance(sinks, bool) or sinks < 0:
        raise ValueError(f"sinks must be a number of tokens, 0 or more: got {sinks!r}; the usual number is 4")


def _check_recent(recent: int, block_size: int) -> None:
    if recent < block_size:
        raise ValueError(
            f"recent must be at least one block of {block_size} tokens: got {recent}; the least that can be held is "
            f"the sinks and one block, so raise recent, or lower block_size (16 is the least)"
        )
