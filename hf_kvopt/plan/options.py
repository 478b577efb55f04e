"""Combinations of settings that depend on each other, the memory each takes, and its predicted time."""

from dataclasses import replace
from typing import NamedTuple

from hf_kvopt.plan.geometry import LayerKV
from hf_kvopt.plan.kv_bytes import CacheSpec, kv_bytes, row_tokens
from hf_kvopt.plan.layout import Layout
from hf_kvopt.plan.memory import cross_bytes
from hf_kvopt.plan.setup import Setup
from hf_kvopt.plan.steps import Step, StepModel, kv_speedup
from hf_kvopt.plan.workloads import ACCEPTED, ACCEPTED_CHAIN, ACCEPTED_WITHOUT_COPIES, Accepted
from hf_kvopt.quant import FormatPolicy

# DynamicCache reads every key and value and writes it anew at each step (torch.cat), beside attention's own read; a
# paged cache that is gathered for another attention does the same.
COPIES = 2.0
# A store outlives requests: it holds up to this many batches, as far as the devices allow.
_MOST_BATCHES = 4


class Option(NamedTuple):
    """One combination of the settings that a plan compares; `format` is "native" or a quantized one."""

    format: str
    is_compiled: bool
    shares_prefix: bool
    draft: str  # "none", "prompt_lookup" or "head"


class Holding(NamedTuple):
    """Memory that the cache of an option takes, over all devices together."""

    block_size: int
    max_tokens: int  # argument of `enable`
    batches: int  # number of the requested batch, at full context, that `max_tokens` holds
    batch_bytes: int  # bytes of the blocks of one such batch
    most_bytes: int  # bytes that the pools grow to under `max_tokens`


class Times(NamedTuple):
    """Predicted times."""

    first_token: Step
    step: Step  # one forward, which yields `accepted` tokens of each row
    accepted: float
    request_s: float


def holding_of(setup: Setup, option: Option, batch: int, batches: int = 1) -> Holding:
    """Return the memory of `option` for `batch` rows; with prefix sharing, of a store for `batches` times as many."""
    policy = FormatPolicy(format=option.format)
    size = max(setup.block_size(option.shares_prefix), policy.block_size())
    spec = CacheSpec(formats=policy, block_size=size, dtype=setup.dtype)
    row = row_tokens(spec, max(setup.context, setup.encoder or 0))
    if option.shares_prefix:
        # A row that continues a shared prefix copies the block in which the prefix ends.
        row += size
    capped = replace(spec, max_tokens=batches * batch * row, compileable=option.is_compiled)
    formats, layers = spec.formats_of(setup.layers), kept_layers(setup, option)
    held = kv_bytes(layers, formats, capped, batch, setup.context, None)
    most = kv_bytes(layers, formats, capped, batches * batch, row, None) if option.shares_prefix else held
    cross = cross_bytes(setup.layers, capped, batch, setup.encoder)
    grown = most.reserved + held.stock + cross.reserved
    return Holding(size, batches * batch * row, batches, held.used + held.stock + cross.used, grown)


def largest_holding(setup: Setup, option: Option, layout: Layout) -> Holding | None:
    """Return the memory of `option`, with as many batches in a store as its devices hold; None if none fits."""
    for batches in range(_MOST_BATCHES if option.shares_prefix else 1, 0, -1):
        held = holding_of(setup, option, setup.batch, batches)
        if setup.fits(layout, held.most_bytes):
            return held
    return None


def kept_layers(setup: Setup, option: Option) -> list[LayerKV]:
    """Return the layers as the cache of `option` keeps them.

    A store and a cache of fixed addresses keep all tokens of sliding layers too: tokens before a window may be shared
    by shorter rows, or are hidden by a mask.
    """
    keeps_all = option.shares_prefix or option.is_compiled
    return [layer._replace(window=None) for layer in setup.layers] if keeps_all else list(setup.layers)


def dynamic_bytes(setup: Setup) -> int:
    """Return the bytes that DynamicCache keeps for the requested batch."""
    spec = CacheSpec(cache="dynamic", dtype=setup.dtype)
    size = kv_bytes(setup.layers, spec.formats_of(setup.layers), spec, setup.batch, setup.context, None)
    return size.used + size.stock + cross_bytes(setup.layers, spec, setup.batch, setup.encoder).used


def times_of(setup: Setup, option: Option, layout: Layout) -> Times:
    """Return the predicted times of `option` on the devices of `layout`."""
    steps, work = step_model(setup, layout), setup.work
    seen = work.seen_share if option.shares_prefix else 0.0
    first = steps.prefill(setup.batch, max(1, int(setup.prompt * (1 - seen))), setup.prompt)
    accepted = accepted_of(setup, option.draft)
    # A step over fixed addresses masks the tokens before a window; other steps do not read them.
    read = option._replace(shares_prefix=False, draft="none")
    native = read_bytes(setup, read._replace(format="native"))
    step = steps.decode(
        setup.batch,
        setup.context,
        native,
        speedup=kv_speedup(option.format, native, read_bytes(setup, read)) if setup.device.is_gpu else 1.0,
        copies=0.0 if setup.takes_attention else COPIES,
        tokens_per_row=accepted.nodes,
        is_compiled=option.is_compiled,
        expands=setup.expands(accepted.nodes),
    )
    return Times(first, step, accepted.tokens, _request(setup, first, step, accepted.tokens))


def default_times(setup: Setup, layout: Layout) -> Times:
    """Return the predicted times of transformers' default: DynamicCache, sdpa, eager, every prompt computed."""
    steps = step_model(setup, layout)
    first = steps.prefill(setup.batch, setup.prompt, setup.prompt)
    step = steps.decode(setup.batch, setup.context, dynamic_bytes(setup), copies=COPIES, expands=setup.has_latents)
    return Times(first, step, 1.0, _request(setup, first, step, 1.0))


def _request(setup: Setup, first: Step, step: Step, accepted: float) -> float:
    # The first new token comes with the prompt.
    return first.seconds + (setup.new_tokens - 1) * step.seconds / accepted


def step_model(setup: Setup, layout: Layout) -> StepModel:
    """Return the time model of the setup on the devices of `layout`."""
    return StepModel(
        device=setup.device, weights=setup.weights, layers=setup.layers, layout=layout, itemsize=setup.dtype.itemsize
    )


def read_bytes(setup: Setup, option: Option) -> int:
    """Return the bytes of keys and values that a step of the whole batch reads."""
    return holding_of(setup, option, setup.batch).batch_bytes


def accepted_of(setup: Setup, draft: str) -> Accepted:
    """Return the accepted length of a drafter under this setup."""
    if draft == "head" and setup.batch > 1:
        return ACCEPTED_CHAIN
    if draft == "prompt_lookup" and not setup.work.copies:
        return ACCEPTED_WITHOUT_COPIES
    return ACCEPTED[draft]
