"""Job: one request inside of a batcher, from the queue to its last token.

waiting ──► filling ──► decoding ──► done        a preempted job waits again, with all its tokens as its prompt
   ▲           │            │
   └───────────┴────────────┘
"""

from collections.abc import Hashable

from torch import Tensor

from hf_kvopt.batching.request import Request
from hf_kvopt.batching.rules import Rules
from hf_kvopt.prefix.batch import BatchCache


class Job:
    """A request, its text so far, and the cache of its own that it has while its prompt is being filled.

    Args:
        request: what the caller holds.
        rules: how tokens are chosen.
        rank: jobs of a lower rank go first; two jobs never have the same one.
        namespace: see `PrefixStore.cache`.
    """

    def __init__(self, request: Request, rules: Rules, rank: tuple[float, int], namespace: Hashable = None) -> None:
        self.request, self.rules, self.rank, self.namespace = request, rules, rank, namespace
        self.text = list(request.prompt)
        self.key: tuple[Hashable, Hashable] | None = None  # what its text is filed under, since it was admitted
        self.cache: BatchCache | None = None  # while filling
        self.read_from = 0  # first token that is read since it was admitted
        self.features: list[Tensor] = []  # [1, tokens, width] of what was read since then, for a drafter
        self.reason: str | None = None
        self.error: BaseException | None = None

    @property
    def is_done(self) -> bool:
        """Tell whether it takes no further token; its request is told once its blocks are given back."""
        return self.reason is not None

    def end(self, reason: str, error: BaseException | None = None) -> None:
        """Take no further token."""
        self.reason, self.error = reason, error

    @property
    def num_new(self) -> int:
        """Generated tokens."""
        return len(self.text) - len(self.request.prompt)

    @property
    def num_held(self) -> int:
        """Tokens in the cache of its own."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @property
    def num_missing(self) -> int:
        """Tokens that its own cache lacks."""
        return len(self.text) - self.num_held

    def take(self, logits: Tensor, best: int, drawn: int | None = None) -> int:
        """Choose, take and tell the next token, of logits [vocab] in float32 of which `best` is the largest.

        One that was `drawn` before, by these rules, is taken as it is.

        Raises:
            Exception: what the request's own logits processors or criteria raise.
        """
        token = best if self.rules.is_plain else drawn
        token = self.rules.choose(self.text, logits) if token is None else token
        logprob = self.rules.logprob_of(token, logits)
        self.text.append(token)
        reason = self.rules.ending(self.text, self.num_new)
        self.request.put(token, logprob)
        if reason is not None:
            self.end(reason)
        return token

    def close(self) -> None:
        """Give the blocks of its own cache back."""
        self.features = []
        if self.cache is not None:
            self.cache.close()
            self.cache = None

    def tell(self) -> None:
        """Tell whoever waits that it is done."""
        self.request.finish(self.reason or "cancelled", self.error)
