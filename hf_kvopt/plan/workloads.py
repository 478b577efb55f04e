"""What a deployment is used for, as numbers that decide; stated with every plan, because they are assumptions."""

from typing import NamedTuple


class Workload(NamedTuple):
    """How requests of a kind look."""

    about: str
    prompt_share: float  # of the context that is prompt
    new_tokens: int
    seen_share: float  # of the prompt that an earlier request or row had as its beginning
    copies: bool  # whether the output repeats stretches of the prompt


WORKLOADS = {
    "chat": Workload("turns on one history and system prompt", 0.75, 300, 0.8, False),
    "agent": Workload("a loop that appends tool results to one history", 0.9, 200, 0.9, True),
    "document": Workload("many questions on one long text", 0.95, 200, 0.95, True),
    "code": Workload("edits and completions of files", 0.8, 400, 0.6, True),
    "batch": Workload("unrelated prompts, answered as fast as all of them can be", 0.5, 256, 0.0, False),
}
# Mean accepted length, bonus token counted, and nodes that are verified: Spec-Bench, Vicuna-13B, A100, batch 1
# (github.com/hemingkexia/Spec-Bench). Prompt lookup gains little where the output does not copy.
ACCEPTED = {"head": (5.7, 60), "prompt_lookup": (1.67, 4), "none": (1.0, 1)}
ACCEPTED_WITHOUT_COPIES = 1.2
# In batches a chain takes the place of the tree.
ACCEPTED_CHAIN = (3.5, 5)
