"""Check of a plan: measures it and transformers' default on the current machine, and compares the prediction.

The model is loaded from the path if it has weights there, else built with random weights from its config. Decode steps
of both sides run interleaved after a prefill of the plan's prompt. Speculation and compilation are left out, because
they change what a step is.
"""

import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.quantized import QuantizedPagedCache
from hf_kvopt.enable import disable, enable
from hf_kvopt.plan import BadInput, Plan, memory, plan
from hf_kvopt.plan.devices import get_device
from hf_kvopt.plan.model_config import load_config
from hf_kvopt.plan.planner import plan_times
from hf_kvopt.plan.weights import model_class

_STEPS, _TURNS = 4, 5
_LEAST_CONTEXT = 64
# Beyond this a check would take too long.
_MOST_PAIRS_CPU, _MOST_PAIRS_GPU = 8192, 1 << 20


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One figure of the check, predicted and measured."""

    what: str
    predicted: str
    measured: str
    ratio: float  # measured over predicted


@dataclass(frozen=True, kw_only=True)
class Checked:
    """Result of a check."""

    where: str
    how: str
    is_equal: bool | None  # None: not comparable
    lines: tuple[Compared, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain values for JSON."""
        return asdict(self)


def check(model: str, made: Plan) -> Checked:
    """Measure the cache and format of plan `made` against DynamicCache with sdpa on this machine.

    Raises:
        BadInput: the weights or the context are too large for this machine.
    """
    notes: list[str] = []
    here = get_device("auto")
    context = _measured_context(made, here.is_gpu, notes)
    # Plan again for what is run: this machine, this length, and nothing but cache and format.
    dtype = made.dtype if here.is_gpu else "float32"
    try:
        again = plan(
            model, device=here, context=context, batch=made.batch, workload=made.workload, goal=made.goal, dtype=dtype
        )
    except BadInput as error:
        raise BadInput(
            f"--check runs the model on {here.name}, which cannot hold it: {error}; or drop --check"
        ) from error
    if again.num_devices > 1:
        raise BadInput(
            f"--check runs the model on one {here.name}, which cannot hold it: {again.num_devices} could; use a "
            "smaller model, a shorter --context, or drop --check"
        )
    subject = _load(model, dtype, "cuda" if here.is_gpu else "cpu", notes)
    if made.option.is_compiled or made.option.draft != "none":
        notes.append("compilation and speculation are left out: evals.speed and evals.acceptance measure them")
    return _measure(subject, made, here, context, dtype, notes)


def _measured_context(made: Plan, is_gpu: bool, notes: list[str]) -> int:
    most = (_MOST_PAIRS_GPU if is_gpu else _MOST_PAIRS_CPU) // made.batch
    chosen = max(_LEAST_CONTEXT, min(made.context, most))
    if chosen < made.context:
        why = "a check should take a minute, not an hour"
    elif chosen > made.context:
        why = "fewer leave no steps to time"
    else:
        return chosen
    notes.append(f"measured at {chosen:,} tokens a row, not {made.context:,}: {why}")
    return chosen


def _load(model: str, dtype: str, device: str, notes: list[str]) -> PreTrainedModel:
    path = Path(model).expanduser()
    if path.is_dir() and any(path.glob("*.safetensors")):
        loaded: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        return loaded.to(device).eval()
    config = load_config(model)
    kind = model_class(config)
    if kind is None:
        raise BadInput(f"no class generates with a {config.model_type} config: nothing to check")
    notes.append("random weights: times and bytes are those of the model, tokens are not")
    torch.manual_seed(0)
    made: Any = kind._from_config(config, dtype=getattr(torch, dtype))
    return made.to(device).eval()


def _measure(subject: PreTrainedModel, made: Plan, here: Any, context: int, dtype: str, notes: list[str]) -> Checked:
    vocabulary = subject.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (made.batch, context), generator=generator).to(subject.device)
    format, is_native = made.option.format, made.option.format == "native"
    attention = not any("attention=False" in line for line in made.code)
    steps = _STEPS * _TURNS
    prompt = max(1, context - steps)
    sides = {"default": _Side(subject, ids[:, :prompt], None, attention)}
    sides["plan"] = _Side(subject, ids[:, :prompt], _cache(subject, format, made.block_size), attention)
    times: dict[str, list[float]] = {name: [] for name in sides}
    tokens = ids[:, prompt : prompt + steps]
    for turn in range(_TURNS):
        for name, side in sides.items() if turn % 2 else reversed(sides.items()):
            times[name] += side.decode(tokens[:, turn * _STEPS : (turn + 1) * _STEPS])
    default, ours = sides["default"], sides["plan"]
    is_equal = None
    if is_native and dtype == "float32":
        is_equal = torch.stack(default.chosen).equal(torch.stack(ours.chosen))
    else:
        notes.append("tokens are compared for native storage in float32 alone; evals.perplexity measures formats")
    predicted = _predict(made, here, context, dtype, subject)
    measured = {name: statistics.median(values) for name, values in times.items()}
    lines = [
        _line("KV bytes used", predicted["kv"], ours.used_bytes(), "{:,.0f}"),
        _line("default: step, ms", predicted["default_step"], 1e3 * measured["default"], "{:,.2f}"),
        _line("plan: step, ms", predicted["step"], 1e3 * measured["plan"], "{:,.2f}"),
        _line(
            "speed-up of a step",
            predicted["default_step"] / predicted["step"],
            measured["default"] / measured["plan"],
            "{:,.2f}x",
        ),
    ]
    disable(subject)
    where = f"{here.name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    how = f"{type(subject).__name__} in {dtype}, batch {made.batch} x {context:,} tokens, medians of {steps} steps"
    return Checked(where=where, how=how, is_equal=is_equal, lines=tuple(lines), notes=tuple(notes))


class _Side:
    """One cache and attention after its prefill."""

    def __init__(self, subject: PreTrainedModel, prompt: Tensor, cache: PagedCache | None, attention: bool) -> None:
        self.subject, self.attention = subject, attention
        self.is_ours = cache is not None
        self.cache: Any = cache if cache is not None else DynamicCache(config=subject.config)
        self.chosen = [self._forward(prompt)]
        gc.collect()

    def decode(self, tokens: Tensor) -> list[float]:
        """Feed `tokens` one by one and return the seconds of each step."""
        times = []
        for column in tokens.split(1, dim=1):
            start = time.perf_counter()
            chosen = self._forward(column)
            times.append(time.perf_counter() - start)
            self.chosen.append(chosen)
        return times

    def used_bytes(self) -> int:
        """Return the bytes of the blocks that hold the tokens."""
        return int(self.cache.stats().used_bytes)

    @torch.no_grad()
    def _forward(self, ids: Tensor) -> Tensor:  # [batch] the likeliest next tokens
        if self.is_ours and self.attention:
            enable(self.subject, cache=None)
        else:
            disable(self.subject)
        # The copy to the CPU waits for the GPU before the clock is read.
        keywords = {compat.cache_keyword(self.subject): self.cache, "logits_to_keep": 1}
        return self.subject(input_ids=ids, **keywords).logits[:, -1].argmax(-1).cpu()


def _cache(subject: PreTrainedModel, format: str, block_size: int) -> PagedCache:
    config = subject.config.get_text_config(decoder=True)
    if format == "native":
        return PagedCache(config, block_size=block_size)
    return QuantizedPagedCache(config, format=format, block_size=block_size)


def _predict(made: Plan, here: Any, context: int, dtype: str, subject: PreTrainedModel) -> dict[str, float]:
    """Return the plan's predictions for the steps that are measured."""
    times = plan_times(subject.config, here, context, made.batch, made.option.format, dtype)
    kv = memory(
        subject.config,
        context=context,
        prompt=max(1, context - _STEPS * _TURNS),
        batch=made.batch,
        format=made.option.format,
        block_size=made.block_size,
        dtype=dtype,
        weights=False,
    ).used_bytes
    return {"kv": kv, "default_step": 1e3 * times.default_step_s, "step": 1e3 * times.step_s}


def _line(what: str, predicted: float, measured: float, form: str) -> Compared:
    return Compared(
        what=what,
        predicted=form.format(predicted),
        measured=form.format(measured),
        ratio=measured / predicted if predicted else float("nan"),
    )
