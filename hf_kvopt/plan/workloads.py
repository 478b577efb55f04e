"""What a deployment is used for, as numbers that decide; stated with every plan, because they are assumptions."""

from typing import NamedTuple


class Workload(NamedTuple):
    """How requests of a kind look: a context is a prompt and the new tokens behind it."""

    about: str
    new_tokens: int  # half of the context at most
    seen_share: float  # of the prompt that an earlier request or row had as its beginning
    copies: bool  # whether the output repeats stretches of the prompt


WORKLOADS = {
    "chat": Workload("turns on one history and system prompt", 300, 0.8, False),
    "agent": Workload("a loop that appends tool results to one history", 200, 0.9, True),
    "document": Workload("many questions on one long text", 200, 0.95, True),
    "code": Workload("edits and completions of files", 400, 0.6, True),
    "batch": Workload("unrelated prompts, answered as fast as all of them can be", 256, 0.0, False),
}


class Accepted(NamedTuple):
    """What a verification yields."""

    tokens: float  # a row, the one that the model itself adds included
    nodes: int  # tokens a row that are verified, the newest one included
    source: str


# Mean accepted length at batch 1: Vicuna-13B, A100 (github.com/hemingkexia/Spec-Bench).
ACCEPTED = {
    "head": Accepted(5.7, 60, "published by Spec-Bench"),
    "prompt_lookup": Accepted(1.67, 4, "published by Spec-Bench"),
    "none": Accepted(1.0, 1, ""),
}
# Prompt lookup gains little where the output does not copy.
ACCEPTED_WITHOUT_COPIES = Accepted(1.2, 4, "assumed")
# In batches a chain takes the place of the tree.
ACCEPTED_CHAIN = Accepted(3.5, 5, "assumed for a chain of 4")
