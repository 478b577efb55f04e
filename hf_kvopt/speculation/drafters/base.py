"""Drafter: proposes tokens for the target to verify. This is the whole contract between the loop and its drafters.

    session = drafter.begin(target, batch_size)             once for each generate() call
    session.extend(read)                                    the prompt, then what each verification kept
    draft = session.propose(plan, sample)                   a chain, or a tree, after the last token of each row
    session.select(rows)                                    finished rows leave

In the papers' notation, p is the target's distribution, q the drafter's, gamma the depth of a draft. The *root* of a
row is its last token: chosen, but not read by the target yet. A draft hangs below it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel


class Read(NamedTuple):
    """Tokens that the target read and kept since the last call, right-padded: row i has `counts[i]` of them.

    The last following token, `following[i, counts[i] - 1]`, is the root of row i. The first call holds the prompt
    without its padding. Drafters that ask for features do not get tokens that were in the cache before the call, as no
    features were computed for them: their first position need not be 0.
    """

    tokens: Tensor  # [batch, width] int64
    following: Tensor  # [batch, width] int64: the token after each of `tokens`
    positions: Tensor  # [batch, width] int64: position ids of `tokens` in the target
    features: Tensor | None  # [batch, width, len(feature_layers) * hidden_size], None where no layers were asked for
    counts: Sequence[int]  # [batch], each at least 1
    # [batch, 1 + num_nodes]: the target's first choice after the root and after each node of the last draft, kept or
    # not (Jacobi decoding continues from them); None after the prompt
    choices: Tensor | None = None


class Plan(NamedTuple):
    """Size of a draft: a chain if num_nodes <= gamma, else a tree."""

    gamma: int  # depth: tokens of the longest path
    num_nodes: int  # tokens to verify below the root
    top_k: int = 1  # children of a node that are considered (EAGLE-2)
    # A chain ends where the drafter's joint probability, its mean over the rows, falls below this; tree nodes below it
    # are left out.
    min_confidence: float = 0.0

    @property
    def is_chain(self) -> bool:
        """Return whether each node has at most one child."""
        return self.num_nodes <= self.gamma


class Draft(NamedTuple):
    """Proposed tokens of every row; may be fewer than planned, or none.

    A chain may carry `q`, the distributions that its tokens were drawn from; without it every token counts as a point
    mass (greedy drafts, lookups, trees).
    """

    tokens: Tensor  # [batch, num_nodes] int64, parents before children
    parents: Tensor | None = None  # [batch, num_nodes] int64: index of the parent, -1 below the root; None for a chain
    q: Tensor | None = None  # [batch, num_nodes, vocab] float32, target vocabulary, chains only
    lengths: Sequence[int] | None = None  # [batch]: usable nodes of each row, counted from the first; None: all

    def first_chain(self) -> "Draft":
        """Return the chain of first children of a tree of one row."""
        assert self.parents is not None
        path: list[int] = []
        for node, parent in enumerate(self.parents[0].tolist()):
            if parent == (path[-1] if path else -1):
                path.append(node)
        return Draft(self.tokens[:, path])


class Sampler(Protocol):
    """Turns a drafter's logits into tokens; made by the loop, so that q is what was sampled from."""

    is_greedy: bool  # arg max: no q is needed

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose a token for each row.

        Args:
            logits: [batch, vocab] over the target's token ids.

        Returns:
            Tokens [batch], and q [batch, vocab], or None for arg max.
        """
        ...


class DraftSession(ABC):
    """State of a drafter in one generate() call, such as the KV cache of a head: one row for each row of the batch."""

    @abstractmethod
    def extend(self, read: Read) -> None:
        """Take in what the target kept, and forget the drafted tokens that it did not keep."""

    @abstractmethod
    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        """Draft after the root of each row; a drafter without trees returns a chain for any plan."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Keep only the rows `rows`, in that order; the others are finished."""

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Free memory; called once, also after an error."""


class Drafter(ABC):
    """A source of drafts: made once, used for any number of generate() calls.

    `feature_layers` are indices into the target's `hidden_states` (0: embeddings, i: output of block i, -1: output of
    the final norm, for Medusa and EAGLE-1); their features are concatenated in this order.
    """

    feature_layers: tuple[int, ...] = ()
    can_tree: bool = False
    # The highest `Plan.min_confidence` that is asked of it: below 1 where its probabilities are too flat.
    max_confidence: float = 1.0
    max_gamma: int | None = None  # the deepest useful draft (Medusa: its number of heads); None: no limit

    def check(self, target: PreTrainedModel) -> None:  # noqa: B027 (most draft for any target)
        """Raise ValueError if this drafter cannot draft for `target`; called before the first token."""

    @abstractmethod
    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        """Return a session without tokens."""
