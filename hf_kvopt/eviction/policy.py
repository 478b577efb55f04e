"""Eviction policies say which tokens a row of some length need not hold any more.

    row of 100 tokens      0 ......... 15 | 16 ............ 51 | 52 .......... 99
    SinkRecent(16, 48)     sinks, kept    | after_step(100)    | recent, kept
                                            = [range(16, 52)]

A policy is a pure function of a row's length. So a row keeps the same tokens alone and in any batch, and a cache can
tell whether taking tokens back would need some that are gone. The block table drops whole blocks inside these ranges.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from torch import Tensor


class PromptStates(NamedTuple):
    """One row of a prompt in one layer, without padding, as it is scored.

    `turn(states, positions, back)` rotates states [heads, n, head_dim] to positions [n] as the model does, or back
    from there; it raises UnsupportedModel where the model has no rotary embedding that can be found.
    """

    q: Tensor  # [num_heads, tokens, head_dim], rotated
    k: Tensor  # [num_kv_heads, tokens, head_dim], rotated
    v: Tensor  # [num_kv_heads, tokens, v_head_dim]
    scale: float  # of the softmax
    turn: Callable[[Tensor, Tensor, bool], Tensor]
    module: Any  # the attention module
    row: int  # of the batch that the module was given
    pads: int  # columns of padding before it


class EvictionPolicy:
    """Base of the policies that a cache takes as `policy=`; a policy of your own overrides `after_step`.

    Examples:
        >>> class EveryOther(EvictionPolicy):
        ...     '''Drop every second stretch of 64 tokens, but for the newest 256.'''
        ...
        ...     def after_step(self, length):
        ...         return [range(start, start + 64) for start in range(64, length - 256 - 64, 128)]
    """

    scores_prompts = False  # whether `score` is asked; see `hf_kvopt.eviction.scores`
    shrinks_chunks = False  # whether `score` is asked of each chunk when the next one was read, not of a prompt once
    selects_blocks = False  # whether `read_tokens` is asked at each step of one token
    by_layer = False  # whether `at` is asked: then layers need not hold equally much

    def after_step(self, length: int) -> Sequence[range]:
        """Return the tokens that a row of `length` tokens need not hold, as ascending ranges with step 1.

        Called with lengths that fill a block. What is named at one length must be named at all greater ones. The block
        that holds the row's last token is kept whatever is named.
        """
        raise NotImplementedError

    def budget(self, length: int) -> int:
        """Return how many tokens of a prompt of `length` tokens each KV head keeps."""
        return length

    def score(
        self,
        q: Tensor,  # [num_heads, tokens, head_dim], rotated
        k: Tensor,  # [num_kv_heads, tokens, head_dim], rotated
        v: Tensor,  # [num_kv_heads, tokens, v_head_dim]
        scale: float,  # of the softmax
    ) -> Tensor:
        """Return [num_kv_heads, tokens]: how much each KV head of one layer wants to keep each token of a prompt.

        Called for each row alone, without padding, once the prompt was read.
        """
        raise NotImplementedError

    def score_states(self, states: PromptStates) -> Tensor:
        """Return `score` of a prompt; to be overridden in its place where a score needs more than it is given."""
        return self.score(states.q, states.k, states.v, states.scale)

    def at(self, layer_idx: int, num_layers: int) -> "EvictionPolicy | HeadPolicies":
        """Return the policy, hashable, of one layer among those without a window; equal ones share a block table."""
        return self

    def read_tokens(self, layer_idx: int) -> int | None:
        """Return how many tokens each KV head of a layer reads in a step of one token; None for all."""
        return None

    def check(self, block_size: int) -> None:
        """Raise ValueError where this policy cannot work with blocks of `block_size` tokens."""


class HeadPolicies(NamedTuple):
    """Policies of one layer some of whose KV heads keep more than the others."""

    heads: tuple[int, ...]  # ascending
    own: EvictionPolicy  # of these heads
    others: EvictionPolicy  # of all other heads
