"""Workloads as numbers that decide; every plan states them, because they are assumptions."""

from typing import NamedTuple


class Workload(NamedTuple):
    """Shape of the requests of one kind: a context is a prompt followed by new tokens."""

    about: str
    new_tokens: int  # at most half of the context
    seen_share: float  # share of the prompt that was the prefix of an earlier request or row
    copies: bool  # the output repeats parts of the prompt


WORKLOADS = {
    "chat": Workload("turns on one history and system prompt", 300, 0.8, False),
    "agent": Workload("a loop that appends tool results to one history", 200, 0.9, True),
    "document": Workload("many questions on one long text", 200, 0.95, True),
    "code": Workload("edits and completions of files", 400, 0.6, True),
    "batch": Workload("unrelated prompts, answered as fast as all of them can be", 256, 0.0, False),
}


class Accepted(NamedTuple):
    """Accepted length of a drafter."""

    tokens: float  # of a row, the target's own token included
    nodes: int  # tokens of a row that are verified, the root included
    source: str


# Mean accepted length at batch 1: Vicuna-13B, A100 (github.com/hemingkexia/Spec-Bench).
ACCEPTED = {
    "head": Accepted(5.7, 60, "published by Spec-Bench"),
    "prompt_lookup": Accepted(1.67, 4, "published by Spec-Bench"),
    "none": Accepted(1.0, 1, ""),
}
# Prompt lookup gains little where the output does not copy.
ACCEPTED_WITHOUT_COPIES = Accepted(1.2, 4, "assumed")
# In batches a chain replaces the tree.
ACCEPTED_CHAIN = Accepted(3.5, 5, "assumed for a chain of 4")
