"""Drafter: what proposes tokens for the target to verify; the whole contract between the loop and its draft models.

    session = drafter.begin(target, batch_size)             once a generate() call
    session.extend(read)                                    the prompt; after that what each verification kept
    draft = session.propose(plan, sample)                   a chain, or a tree, behind the last token of each row
    session.select(rows)                                    rows that are finished leave

In the papers' words: p is the target's distribution, q the drafter's, gamma the depth of a draft. The *root* of a row
is its last token: sampled, but not read by the target yet. A draft hangs below it.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor
from transformers import PreTrainedModel


class Read(NamedTuple):
    """Tokens that the target has read since the last call, and kept; right-padded, `counts[i]` of row i are real.

    The last token behind (`following[i, counts[i] - 1]`) is the root of row i. The first call is the prompt, without
    its padding; drafters that ask for features get it without what lay in a prefix cache before, as nothing was
    computed for that, so their first position need not be 0.
    """

    tokens: Tensor  # [batch, width] int64
    following: Tensor  # [batch, width] int64: the token behind each
    positions: Tensor  # [batch, width] int64: position ids of `tokens` in the target
    features: Tensor | None  # [batch, width, len(feature_layers) * hidden_size], None where no layers were asked for
    counts: Sequence[int]  # [batch], each at least 1
    # [batch, 1 + num_nodes]: the target's first choice behind the root and behind each node of the last draft, kept or
    # not (Jacobi decoding goes on from them); None after the prompt
    choices: Tensor | None = None


class Plan(NamedTuple):
    """How much to draft: a chain where num_nodes <= gamma, else a tree."""

    gamma: int  # depth: tokens of the longest path
    num_nodes: int  # tokens to verify below the root
    top_k: int = 1  # children of a node that are considered (EAGLE-2)
    # chains end where the drafter's joint probability of them, its mean over the rows, falls below this; of a tree the
    # nodes below it are left out
    min_confidence: float = 0.0

    @property
    def is_chain(self) -> bool:
        """Whether each node has one child."""
        return self.num_nodes <= self.gamma


class Draft(NamedTuple):
    """Proposed tokens of every row. Fewer than planned are welcome, none as well.

    A chain may carry `q`, the very distributions its tokens were drawn from; without it every token counts as a point
    mass (greedy drafts, look-ups, trees).
    """

    tokens: Tensor  # [batch, num_nodes] int64, parents before children
    parents: Tensor | None = None  # [batch, num_nodes] int64: index of the parent, -1 below the root; None for a chain
    q: Tensor | None = None  # [batch, num_nodes, vocab] float32, target vocabulary, chains only
    lengths: Sequence[int] | None = None  # [batch]: usable nodes of each row, the first ones; None: all

    def first_chain(self) -> "Draft":
        """The first child of each node of a tree, for one row."""
        assert self.parents is not None
        path: list[int] = []
        for node, parent in enumerate(self.parents[0].tolist()):
            if parent == (path[-1] if path else -1):
                path.append(node)
        return Draft(self.tokens[:, path])


class Sampler(Protocol):
    """How a drafter turns its logits into a token: the loop's business, so that q is what sampling really used."""

    is_greedy: bool  # arg max: no q is needed

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """([batch] tokens, [batch, vocab] q or None for arg max) of logits [batch, vocab] over the target's ids."""
        ...


class DraftSession(ABC):
    """State of one generate() call: for instance the small KV cache of a head, one row for each row of the batch."""

    @abstractmethod
    def extend(self, read: Read) -> None:
        """Take in what the target kept; what was drafted before and not kept is forgotten."""

    @abstractmethod
    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        """Draft behind the root of each row; a drafter without trees proposes a chain whatever the plan."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Let row i be what row `rows[i]` was; the others are finished."""

    def close(self) -> None:  # noqa: B027 (most have nothing to do)
        """Give memory back; called once, also after an error."""


class Drafter(ABC):
    """Something that drafts: made once, used for any number of generate() calls.

    `feature_layers` are indices into the target's `hidden_states` (0: embeddings, i: behind block i, -1: behind the
    final norm, as Medusa and EAGLE-1 take them); their features are concatenated in this order.
    """

    feature_layers: tuple[int, ...] = ()
    can_tree: bool = False
    max_gamma: int | None = None  # the deepest draft that makes sense (Medusa: its heads); None: no limit of its own

    def check(self, target: PreTrainedModel) -> None:  # noqa: B027 (most draft for any target)
        """Raise ValueError where this drafter cannot draft for `target`; called before the first token."""

    @abstractmethod
    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        """A session without tokens."""
