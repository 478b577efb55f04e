"""DuoAttention: some KV heads keep the whole text, the others sinks and recent tokens (arXiv:2410.10819).

    layer 3   heads 0 and 2   [ all tokens                                            ]   one block table
              heads 1 and 3   [ sinks ]                                    [ recent ]     another one

Few heads of a model look far back, and they do so for every text: those that find what was said. The others look at
their neighbourhood and at the first tokens. `retrieval_heads` measures which are which.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hf_kvopt.config import parse_tokens
from hf_kvopt.eviction.policy import EvictionPolicy, HeadPolicies
from hf_kvopt.eviction.recent import SinkRecent


@dataclass(frozen=True)
class StreamingHeads(SinkRecent):
    """Sinks and recent tokens of some heads, in layers whose other heads hold more."""

    by_layer = True


@dataclass(frozen=True)
class DuoAttention(EvictionPolicy):
    """Keep the whole text in some KV heads of each layer, sinks and recent tokens in the others.

    Blocks of the two kinds of heads are apart, so that those of the others really go back: a share s of whole heads
    holds s of the memory, and a constant beside it.

    Args:
        heads: for each layer without a window, the numbers of its KV heads that keep all; as `retrieval_heads` returns.
        sinks: first tokens that the other heads keep; see `SinkRecent`.
        recent: newest tokens that the other heads keep; see `SinkRecent`.

    Raises:
        TypeError, ValueError: heads that are no numbers, or are named twice; or a cache of another number of layers.
        UnsupportedModel: a model whose heads share one latent.

    Source: DuoAttention, arXiv:2410.10819, with heads that are measured and not trained.

    Examples:
        >>> from hf_kvopt import enable
        >>> model = enable(model, policy=DuoAttention(heads=[[0]] * model.config.num_hidden_layers))
    """

    heads: Sequence[Sequence[int]]
    sinks: int = 64
    recent: int | str = 256

    by_layer = True

    def __post_init__(self) -> None:
        if isinstance(self.heads, str) or not isinstance(self.heads, Sequence):
            raise TypeError(
                f"heads must say for each layer which KV heads keep all, such as [[0], [], [0, 2]]: got "
                f"{self.heads!r}; retrieval_heads(model) measures them"
            )
        own = tuple(_checked(layer, heads) for layer, heads in enumerate(self.heads))
        object.__setattr__(self, "heads", own)
        object.__setattr__(self, "recent", parse_tokens(self.recent, "recent"))
        self._others.check(1)  # its numbers can work

    def __repr__(self) -> str:
        count = sum(map(len, self.heads))
        return f"DuoAttention({count} whole heads, sinks={self.sinks}, recent={self.recent})"

    def after_step(self, length: int) -> Sequence[range]:
        return []

    def at(self, layer_idx: int, num_layers: int) -> HeadPolicies:
        if num_layers != len(self.heads):
            raise ValueError(
                f"heads must have an entry for each of the {num_layers} layers without a window: got "
                f"{len(self.heads)}; measure them on this model with retrieval_heads(model)"
            )
        return HeadPolicies(tuple(self.heads[layer_idx]), self, self._others)

    def check(self, block_size: int) -> None:
        self._others.check(block_size)

    @property
    def _others(self) -> StreamingHeads:
        return StreamingHeads(self.sinks, self.recent)


def _checked(layer: int, heads: object) -> tuple[int, ...]:
    """Return the heads of a layer, ascending."""
    numbers = list(heads) if isinstance(heads, Sequence) and not isinstance(heads, str) else None
    if numbers is None or any(not isinstance(head, int) or isinstance(head, bool) for head in numbers):
        raise TypeError(f"heads of a layer must be a list of numbers, such as [0, 2]: got {heads!r} for layer {layer}")
    if len(set(numbers)) != len(numbers) or min(numbers, default=0) < 0:
        raise ValueError(f"heads of a layer must be named once, from 0 on: got {heads!r} for layer {layer}")
    return tuple(sorted(numbers))
