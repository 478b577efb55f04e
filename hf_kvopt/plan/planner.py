"""What to choose for a deployment: every combination that fits is timed by arithmetic, and the best one explained.

    request = time to the first token + new tokens x step / accepted length

Times are predictions of `steps.py`; `python -m hf_kvopt plan --check` measures them on the machine at hand.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from hf_kvopt.plan.choices import Choice, explain
from hf_kvopt.plan.code import python_lines
from hf_kvopt.plan.devices import Device
from hf_kvopt.plan.options import Option, Times, default_times, times_of
from hf_kvopt.plan.setup import Setup, set_up

# A format must save this share of a request's time, or be needed to fit: its loss is not zero.
WORTH_A_LOSS = 0.05
MOST_ROWS_TO_DRAFT = 8
# From here on a row's table in blocks of 16 has a thousand entries.
LONG_ROW = 16384


class Predicted(NamedTuple):
    """What the plan is expected to take, beside transformers' default (DynamicCache, sdpa, eager).

    Bytes over all devices; `step_ms` is one forward of the whole batch, `request_s` a prompt and all its new tokens.
    """

    weight_bytes: int
    kv_bytes: int
    default_kv_bytes: int
    step_ms: float
    default_step_ms: float
    first_token_ms: float
    default_first_token_ms: float
    request_s: float
    default_request_s: float
    gain: float  # default request over ours
    default_num_devices: int | None  # that the default needs for its memory; timed on as many as the plan has
    largest_batch: int


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A decision with its reasons; `option` says it for programs, `code` is what to run."""

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
    choices: tuple[Choice, ...]
    predicted: Predicted
    assumptions: tuple[str, ...]
    code: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {
            "device": self.device._asdict(),
            "option": self.option._asdict(),
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
) -> Plan:
    """Choose attention, cache, format, block size, prefix sharing, speculation, compilation and parallelism.

    Args:
        model: see `memory`.
        device: name in the table of `hf_kvopt.plan.devices`, "cpu" or "auto".
        context: tokens a row, prompt and new ones together.
        batch: rows.
        workload: "chat", "agent", "document", "code" or "batch"; its numbers are `Plan.assumptions`.
        goal: "latency" of a request, or "throughput" of all of them.
        head: whether a trained draft head for this model is at hand.
        budget: bytes a device may use; 0.9 of its memory by default.
        dtype: of the weights; the config's, or bfloat16.

    Raises:
        BadInput: the question cannot be understood, or nothing fits.
        UnsupportedModel: the model has no KV cache.

    Source: arithmetic over bytes and operations; published host times and accepted lengths are named in
    `hf_kvopt.plan.steps` and `workloads`, facts of cards in `devices`.
    """
    setup = set_up(model, device, context, batch, workload, goal, budget, dtype)
    count = _fewest_devices(setup)
    timed = {option: times_of(setup, option, count) for option in _options(setup, count, head)}
    best = _best(timed)
    default, times = default_times(setup, count), timed[best]
    block_size = 16 if best.shares_prefix or setup.context < LONG_ROW else 64
    return Plan(
        model_type=setup.config.model_type,
        device=setup.device,
        num_devices=count,
        workload=workload,
        goal=goal,
        batch=setup.batch,
        context=setup.context,
        dtype=str(setup.dtype).removeprefix("torch."),
        option=best,
        block_size=block_size,
        choices=explain(setup, best, timed, default, count, block_size, head),
        predicted=Predicted(
            weight_bytes=setup.weights.num_bytes,
            kv_bytes=setup.kv(best.format, block_size=block_size),
            default_kv_bytes=setup.kv("native"),
            step_ms=times.step_s * 1e3,
            default_step_ms=default.step_s * 1e3,
            first_token_ms=times.first_token_s * 1e3,
            default_first_token_ms=default.first_token_s * 1e3,
            request_s=times.request_s,
            default_request_s=default.request_s,
            gain=default.request_s / times.request_s,
            default_num_devices=setup.num_devices("native"),
            largest_batch=setup.largest_batch(best.format, count),
        ),
        assumptions=_assumptions(setup),
        code=tuple(python_lines(setup, best, count, block_size)),
    )


class StepTimes(NamedTuple):
    """Seconds of one eager decode step."""

    step_s: float
    default_step_s: float


def plan_times(config: Any, device: Device, context: int, batch: int, format: str, dtype: str) -> StepTimes:
    """Return the predicted eager decode steps of a format and of the default, for one device; see `plan`."""
    setup = set_up(config, device, context, batch, "batch", "latency", None, dtype)
    ours = times_of(setup, Option(format, False, False, "none"), 1)
    return StepTimes(ours.step_s, default_times(setup, 1).step_s)


def _fewest_devices(setup: Setup) -> int:
    counts = [count for name in setup.formats if (count := setup.num_devices(name)) is not None]
    return min(counts)


def _options(setup: Setup, num_devices: int, head: bool) -> Iterator[Option]:
    """Every combination that fits and can be run together."""
    formats = [name for name in setup.formats if (setup.num_devices(name) or num_devices + 1) <= num_devices]
    # The one that fits with the least loss, and those behind it if they pay.
    can_share = setup.work.seen_share > 0 and not setup.has_states and not setup.config.is_encoder_decoder
    can_draft = not setup.has_states and setup.batch <= MOST_ROWS_TO_DRAFT and setup.goal == "latency"
    drafts = ["none", *(["prompt_lookup", "head"] if head else ["prompt_lookup"] if setup.work.copies else [])]
    for name in formats:
        for shares_prefix in {False, can_share}:
            for draft in drafts if can_draft else ["none"]:
                yield Option(name, False, shares_prefix, draft)
        if setup.device.is_gpu and not setup.has_states:
            # A graph needs fixed addresses and lengths on the device: nothing is shared, no draft is cut back.
            yield Option(name, True, False, "none")


def _best(timed: dict[Option, Times]) -> Option:
    """The fastest, where a lossy format has to be worth its loss against the best of the less lossy ones."""
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
    work = setup.work
    return (
        f"{setup.workload}: {work.about}; {setup.prompt:,} tokens of prompt, {work.new_tokens} new ones a request, "
        f"{work.seen_share:.0%} of the prompt seen before",
        f"{setup.device.name}: {setup.device.bandwidth / 1e9:,.0f} GB/s, {setup.device.flops / 1e12:,.3g} TFLOP/s "
        f"({setup.device.source})",
        "times are arithmetic over bytes and operations, not measurements; --check measures here",
    )
