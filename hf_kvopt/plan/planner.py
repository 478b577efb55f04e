"""Planner: predicts the time of every combination of settings that fits, and explains the best one.

    request = time to the first token + (new tokens - 1) x step / accepted length

Times are predictions of `steps.py`; `python -m hf_kvopt plan --check` measures them on the current machine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from hf_kvopt.plan.capacity import largest
from hf_kvopt.plan.choices import explain
from hf_kvopt.plan.code import python_lines
from hf_kvopt.plan.devices import Device
from hf_kvopt.plan.inputs import show_number
from hf_kvopt.plan.layout import Layout
from hf_kvopt.plan.options import (
    Holding,
    Option,
    Times,
    default_times,
    dynamic_bytes,
    holding_of,
    largest_holding,
    times_of,
)
from hf_kvopt.plan.setup import Setup, require_layout, set_up
from hf_kvopt.plan.weighing import MOST_ROWS_TO_DRAFT, WORTH_A_LOSS, Choice, Weighing, plain


class Predicted(NamedTuple):
    """Predicted cost of a plan and of transformers' default (DynamicCache, sdpa, eager).

    Bytes are over all devices; `step_ms` is one forward of the whole batch, `request_s` a prompt and all its new
    tokens.
    """

    weight_bytes: int
    kv_bytes: int  # of one batch at its full context
    most_kv_bytes: int  # bytes that the cache grows to under `max_tokens`
    max_tokens: int  # argument of `enable`
    default_kv_bytes: int
    step_ms: float
    default_step_ms: float
    accepted: float  # tokens of a row that a step yields
    first_token_ms: float
    default_first_token_ms: float
    request_s: float
    default_request_s: float
    gain: float  # default request time over this plan's
    default_num_devices: int | None  # for the default's memory; its times are for `num_devices` of the plan
    largest_batch: int | None  # rows of the full context that fit; None: no limit


class Weighed(NamedTuple):
    """An option that fits, with its predicted cost."""

    option: Option
    kv_bytes: int
    most_kv_bytes: int
    first_token_ms: float
    step_ms: float
    request_s: float


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Chosen settings with their reasons; `option` is the machine-readable choice, `code` the lines to run."""

    model_type: str
    device: Device
    num_devices: int
    workload: str
    goal: str
    batch: int
    context: int
    dtype: str
    option: Option
    block_size: int
    weighed: tuple[Weighed, ...]
    choices: tuple[Choice, ...]
    predicted: Predicted
    assumptions: tuple[str, ...]
    code: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON."""
        return asdict(self) | {
            "device": self.device._asdict(),
            "option": self.option._asdict(),
            "weighed": [one._asdict() | {"option": one.option._asdict()} for one in self.weighed],
            "predicted": self.predicted._asdict(),
        }


def plan(
    model: Any,
    *,
    device: str | Device = "auto",
    context: int | str = "32k",
    batch: int = 1,
    workload: str = "chat",
    goal: str = "latency",
    head: bool = False,
    budget: int | str | None = None,
    dtype: torch.dtype | str | None = None,
    fixed: bool = True,
) -> Plan:
    """Choose attention, cache, format, block size, prefix sharing, speculation, compilation and parallelism.

    Args:
        model: as in `memory`.
        device: name in the table of `hf_kvopt.plan.devices`, "cpu" or "auto".
        context: tokens of a row, prompt and new ones together, such as 32_768 or "32k".
        batch: number of rows.
        workload: "chat", "agent", "document", "code" or "batch"; `Plan.assumptions` states its numbers.
        goal: optimize the "latency" of a request, or the "throughput" of all of them.
        head: a trained draft head for this model is available.
        budget: bytes that one device may use; defaults to 0.9 of its memory.
        dtype: dtype of the weights; defaults to the config's, else bfloat16.
        fixed: allow a cache of fixed addresses, which a compiled step needs.

        Returns:
            The plan; bytes over all devices, times in the units of their names (`_ms`, `_s`).

    Raises:
        BadInput: a setting is invalid, or nothing fits.
        UnsupportedModel: the model has no KV cache.

    Source: arithmetic over bytes and operations. `hf_kvopt.plan.steps` and `workloads` cite the published host times
        and accepted lengths, `devices` the facts of devices.
    """
    setup = set_up(model, device, context, batch, workload, goal, budget, dtype, fixed)
    smallest = min(holding_of(setup, plain(name), setup.batch).most_bytes for name in setup.formats)
    layout = require_layout(setup, smallest)
    held = {option: largest_holding(setup, option, layout) for option in _options(setup, layout, head)}
    fitting = {option: holding for option, holding in held.items() if holding is not None}
    timed = {option: times_of(setup, option, layout) for option in fitting}
    best = _best(timed)
    default = default_times(setup, layout)
    weighing = Weighing(
        setup=setup,
        layout=layout,
        head=head,
        held=fitting,
        misfits=tuple(option for option, holding in held.items() if holding is None),
        timed=timed,
        default=default,
        best=best,
        largest_batch=_largest_batch(setup, best, layout),
    )
    return Plan(
        model_type=setup.config.model_type,
        device=setup.device,
        num_devices=layout.count,
        workload=workload,
        goal=goal,
        batch=setup.batch,
        context=setup.context,
        dtype=str(setup.dtype).removeprefix("torch."),
        option=best,
        block_size=fitting[best].block_size,
        weighed=tuple(_weighed(option, fitting[option], times) for option, times in timed.items()),
        choices=explain(weighing),
        predicted=_predicted(weighing),
        assumptions=_assumptions(setup),
        code=tuple(python_lines(setup, best, layout, fitting[best])),
    )


def _predicted(weighing: Weighing) -> Predicted:
    setup, times, default = weighing.setup, weighing.timed[weighing.best], weighing.default
    held = weighing.held[weighing.best]
    layouts = (layout.count for layout in setup.layouts() if setup.fits(layout, dynamic_bytes(setup)))
    return Predicted(
        weight_bytes=setup.weights.num_bytes,
        kv_bytes=held.batch_bytes,
        most_kv_bytes=held.most_bytes,
        max_tokens=held.max_tokens,
        default_kv_bytes=dynamic_bytes(setup),
        step_ms=times.step.seconds * 1e3,
        default_step_ms=default.step.seconds * 1e3,
        accepted=times.accepted,
        first_token_ms=times.first_token.seconds * 1e3,
        default_first_token_ms=default.first_token.seconds * 1e3,
        request_s=times.request_s,
        default_request_s=default.request_s,
        gain=default.request_s / times.request_s,
        default_num_devices=next(layouts, None),
        largest_batch=weighing.largest_batch,
    )


def _weighed(option: Option, held: Holding, times: Times) -> Weighed:
    first, step = times.first_token.seconds * 1e3, times.step.seconds * 1e3
    return Weighed(option, held.batch_bytes, held.most_bytes, first, step, times.request_s)


def _largest_batch(setup: Setup, option: Option, layout: Layout) -> int | None:
    """Return the most rows of the full context that fit with `option`, in one batch; None: no limit."""
    return largest(lambda rows: setup.fits(layout, holding_of(setup, option, rows).most_bytes), 1 << 20)


class StepTimes(NamedTuple):
    """Seconds of one eager decode step."""

    step_s: float
    default_step_s: float


def plan_times(config: Any, device: Device, context: int, batch: int, format: str, dtype: str) -> StepTimes:
    """Return the predicted eager decode steps of a format and of the default, for one device; see `plan`."""
    setup = set_up(config, device, context, batch, "batch", "latency", None, dtype)
    one = Layout()
    return StepTimes(times_of(setup, plain(format), one).step.seconds, default_times(setup, one).step.seconds)


def _options(setup: Setup, layout: Layout, head: bool) -> Iterator[Option]:
    """Yield every combination that can run together, the least lossy format first."""
    can_share = setup.work.seen_share > 0 and setup.why_not_shared is None
    can_draft = (
        not setup.has_states
        and not setup.config.is_encoder_decoder
        and setup.batch <= MOST_ROWS_TO_DRAFT
        and setup.goal == "latency"
        # Each process of a divided model would time, and stop, its drafts on its own.
        and not layout.is_divided
    )
    drafts = ["none", *(["prompt_lookup", "head"] if head else ["prompt_lookup"] if setup.work.copies else [])]
    # A graph needs fixed addresses and lengths on the device: no sharing, no cropped drafts.
    can_compile = (
        setup.fixed and setup.device.is_gpu and layout.count == 1 and not setup.has_states and setup.weights.compiles
    )
    for name in setup.formats:
        for shares_prefix in (False, True) if can_share else (False,):
            for draft in drafts if can_draft else ["none"]:
                yield Option(name, False, shares_prefix, draft)
        if can_compile:
            yield Option(name, True, False, "none")


def _best(timed: Mapping[Option, Times]) -> Option:
    """Return the fastest option; a lossy format must beat the best less lossy one by `WORTH_A_LOSS`."""
    by_format: dict[str, Option] = {}
    for option, times in timed.items():
        held = by_format.get(option.format)
        if held is None or times.request_s < timed[held].request_s:
            by_format[option.format] = option
    chosen, *others = by_format.values()
    for option in others:
        if timed[option].request_s < (1 - WORTH_A_LOSS) * timed[chosen].request_s:
            chosen = option
    return chosen


def _assumptions(setup: Setup) -> tuple[str, ...]:
    work, device = setup.work, setup.device
    rate, unit = (device.flops / 1e12, "TFLOP/s") if device.flops >= 1e12 else (device.flops / 1e9, "GFLOP/s")
    limit = setup.max_positions
    beyond = f"the model is made for {limit:,} tokens: {setup.context:,} are beyond" if limit else ""
    return (
        f"{setup.workload}: {work.about}; {setup.prompt:,} tokens of prompt, {setup.new_tokens:,} new ones a request, "
        f"{work.seen_share:.0%} of the prompt seen before",
        f"{device.name}: {device.bandwidth / 1e9:,.0f} GB/s, {show_number(rate)} {unit} ({device.source})",
        *setup.weights.notes,
        *([beyond] if limit is not None and setup.context > limit else []),
        "times are arithmetic over bytes and operations, not measurements, and a step is one at the full context; "
        "--check measures here",
    )
