"""Hierarchical: a document that is read chunk by chunk, of which older chunks shrink to their best tokens.

    chunks of 512, tokens=64      [64][64][64][64][ 512, newest ] generated ...

Each chunk is scored by the queries of the chunk behind it, so that it is known what the text goes on to ask for. Memory
grows by `tokens` in each chunk, and a prompt never takes more than two chunks beside what was kept.
"""

from dataclasses import dataclass

from torch import Tensor

from hf_kvopt.config import parse_tokens
from hf_kvopt.eviction.scores import PromptPolicy, attended, check_votes


@dataclass(frozen=True)
class Hierarchical(PromptPolicy):
    """Keep the newest chunk of a text whole, and of each older one what the chunk behind it attended to most.

    A chunk is what one forward of several tokens reads: pass `prefill_chunk_size=512` to `generate`, or feed a document
    in pieces. Further turns of a chat are chunks too, with the answer before them. Each KV head of each layer keeps
    tokens of its own, equally many. A prompt that is read at once is one chunk, and stays whole.

    Args:
        tokens: that each KV head keeps of an older chunk, such as 64 or "1k".
        window: last queries of a chunk that vote on the one before it.
        kernel: odd number of neighbouring tokens over which votes are averaged.

    Raises:
        ValueError: numbers that cannot work.
        UnsupportedModel: a model whose heads share one latent, or a format that seals its blocks.

    Source: chunks and their summaries, as in LongLLMLingua (arXiv:2310.06839) and Infini-attention (arXiv:2404.07143),
    with tokens that are chosen by the votes of SnapKV (arXiv:2404.14469).

    Examples:
        >>> from hf_kvopt import enable
        >>> model = enable(model, cache="int8", policy=Hierarchical(tokens=64))
        >>> output = model.generate(**inputs, prefill_chunk_size=512)
    """

    tokens: int | str = 64
    window: int = 32
    kernel: int = 5

    shrinks_chunks = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", parse_tokens(self.tokens, "tokens"))
        check_votes(self.window, self.kernel)

    def budget(self, length: int) -> int:
        assert isinstance(self.tokens, int)
        return min(length, self.tokens)

    def score(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return attended(q[:, -self.window :], k, scale, self.kernel)
