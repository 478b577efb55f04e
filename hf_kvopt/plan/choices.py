"""Explanation of a plan: for each topic the choice, its reason, its predicted gain, and the rejected alternatives.

Every sentence is made from the figures that decided, so that text and figures agree.
"""

from hf_kvopt.plan import choices_memory as memory
from hf_kvopt.plan import choices_speed as speed
from hf_kvopt.plan.weighing import Choice, Weighing


def explain(weighing: Weighing) -> tuple[Choice, ...]:
    """Return one choice for each topic."""
    topics = (
        memory.attention,
        memory.cache,
        memory.format,
        memory.block_size,
        speed.prefix,
        speed.speculation,
        speed.compile,
        memory.parallelism,
    )
    return tuple(topic(weighing) for topic in topics)
