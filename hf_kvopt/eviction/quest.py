"""Quest: keeps every token, and reads of each row only the blocks that matter to the query (arXiv:2406.10774).

    block b     low, high [num_kv_heads, head_dim]      least and greatest of each channel over the keys of b
    query q     sum over channels of max(q low, q high)      no key of b can score higher
    read        the blocks of the highest bounds for each KV head, and the newest one

Nothing is dropped: memory is that of the whole text, and two float32 vectors a block of each KV head beside it. What is
saved is reading.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from hf_kvopt.config import parse_tokens
from hf_kvopt.eviction.policy import EvictionPolicy


@dataclass(frozen=True)
class Quest(EvictionPolicy):
    """Read at each decoding step, for each KV head, the blocks that the query can attend to most.

    Prompts, and all forwards of several tokens, read everything. Where the budget covers a row, all of it is read.

    Args:
        tokens: that a KV head reads of a row, such as 1024 or "1k": at least two blocks.
        whole_layers: first layers, which read everything: their attention is spread over the text.

    Raises:
        ValueError: numbers that cannot work.
        UnsupportedModel: a model whose heads share one latent, or a format that seals its blocks.

    Source: Quest, arXiv:2406.10774; with groups of query heads, whose bounds are added up behind a softmax.

    Examples:
        >>> from hf_kvopt import enable
        >>> model = enable(model, policy=Quest(tokens="1k"))
    """

    tokens: int | str = 1024
    whole_layers: int = 2

    selects_blocks = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", parse_tokens(self.tokens, "tokens"))
        if not isinstance(self.whole_layers, int) or isinstance(self.whole_layers, bool) or self.whole_layers < 0:
            raise ValueError(f"whole_layers must be a number of layers, 0 or more: got {self.whole_layers!r}")

    def after_step(self, length: int) -> Sequence[range]:
        return []

    def read_tokens(self, layer_idx: int) -> int | None:
        return None if layer_idx < self.whole_layers else cast(int, self.tokens)

    def check(self, block_size: int) -> None:
        if cast(int, self.tokens) < 2 * block_size:
            raise ValueError(
                f"tokens must be at least two blocks of {block_size} tokens, of which the newest is always read: got "
                f"{self.tokens}; raise it to {2 * block_size} or more, or lower block_size"
            )
