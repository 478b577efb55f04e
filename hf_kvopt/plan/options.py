"""The settings that interact, and what each combination of them is predicted to take."""

from typing import NamedTuple

from hf_kvopt.plan.setup import Setup
from hf_kvopt.plan.steps import kv_speedup
from hf_kvopt.plan.workloads import ACCEPTED, ACCEPTED_CHAIN, ACCEPTED_WITHOUT_COPIES

# DynamicCache reads every key and value and writes it anew at each step (torch.cat), beside attention's own read.
_CAT_COPIES = 2.0


class Option(NamedTuple):
    """One combination of the settings that a plan weighs; `format` is "native" or a quantized one."""

    format: str
    is_compiled: bool
    shares_prefix: bool
    draft: str  # "none", "prompt_lookup" or "head"


class Times(NamedTuple):
    """Predicted seconds."""

    first_token_s: float
    step_s: float  # of one forward, which yields `accepted` tokens a row
    accepted: float
    request_s: float


def times_of(setup: Setup, option: Option, num_devices: int) -> Times:
    """Return what `option` takes on `num_devices` devices."""
    steps, work = setup.steps(num_devices), setup.work
    seen = work.seen_share if option.shares_prefix else 0.0
    computed = max(1, int(setup.prompt * (1 - seen)))
    first = steps.prefill(setup.batch, computed, setup.prompt)
    accepted, nodes = accepted_of(setup, option.draft)
    native = setup.kv("native")
    step = steps.decode(
        setup.batch,
        setup.context,
        native,
        speedup=kv_speedup(option.format, native, setup.kv(option.format)) if setup.device.is_gpu else 1.0,
        tokens_per_row=nodes,
        is_compiled=option.is_compiled,
    )
    return Times(first, step, accepted, first + work.new_tokens * step / accepted)


def default_times(setup: Setup, num_devices: int) -> Times:
    """Return what transformers' default takes: DynamicCache, sdpa, eager, every prompt computed."""
    steps = setup.steps(num_devices)
    first = steps.prefill(setup.batch, setup.prompt, setup.prompt)
    step = steps.decode(setup.batch, setup.context, setup.kv("native"), copies=_CAT_COPIES)
    return Times(first, step, 1.0, first + setup.work.new_tokens * step)


def accepted_of(setup: Setup, draft: str) -> tuple[float, int]:
    """(tokens a step yields, tokens a row that it verifies) with a drafter."""
    if draft == "head" and setup.batch > 1:
        return ACCEPTED_CHAIN
    accepted, nodes = ACCEPTED[draft]
    if draft == "prompt_lookup" and not setup.work.copies:
        accepted = ACCEPTED_WITHOUT_COPIES
    return accepted, nodes
