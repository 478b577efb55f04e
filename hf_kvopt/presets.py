"""Settings of `enable` by what a person would say: "chat", "long", "throughput", "lowest memory".

    enable(model, "chat") ─► plan(model.config, ...) on this machine ─► cache, prefix sharing, drafts ─► one line said

A preset asks the planner, so it gives what `python -m hf_kvopt plan` gives, but for caches of fixed addresses: their
capacity depends on the batch, which no one has named yet.
"""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from hf_kvopt.plan import Option, Plan, plan

# Of what a request is taken to hold where the model could hold more.
_MOST_TOKENS = 32768


class Preset(NamedTuple):
    """A question to the planner."""

    about: str
    workload: str
    goal: str
    batch: int
    most_tokens: int | None  # of a row; None for as many as the model is made for


PRESETS = {
    "chat": Preset("turns on one history, one at a time", "chat", "latency", 1, _MOST_TOKENS),
    "long": Preset("questions on texts as long as the model takes", "document", "latency", 1, None),
    "throughput": Preset("unrelated prompts in batches of 8", "batch", "throughput", 8, 4096),
    "lowest memory": Preset("the smallest cache, whatever a step takes", "batch", "latency", 1, _MOST_TOKENS),
}


class Resolved(NamedTuple):
    """Choice that a preset stands for on this model and machine."""

    cache: str
    options: dict[str, Any]  # keyword arguments of `enable`
    said: str  # one line


def resolve(name: str, model: PreTrainedModel) -> Resolved:
    """Choose what `enable` is to set for a preset.

    Args:
        name: of `PRESETS`.
        model: a loaded model; its device decides whether a card or the CPU is planned for.

    Raises:
        BadInput: nothing fits this machine, or the weights cannot be counted from the config.
        UnsupportedModel: the model has no KV cache.
    """
    preset = PRESETS[name]
    made = plan(
        model.config,
        device="cpu" if model.device.type == "cpu" else "auto",
        context=_context(model, preset),
        batch=preset.batch,
        workload=preset.workload,
        goal=preset.goal,
        dtype=model.dtype if isinstance(model.dtype, torch.dtype) else None,
        fixed=False,
    )
    option = min(made.weighed, key=lambda one: one.kv_bytes).option if name == "lowest memory" else made.option
    options = _options(made, option)
    cache = "paged" if option.format == "native" else option.format
    settings = ", ".join([f'cache="{cache}"', *(f"{key}={value!r}" for key, value in options.items())])
    return Resolved(cache, options, f'hf_kvopt: "{name}" on {made.device.name}: {settings} ({preset.about})')


def _context(model: PreTrainedModel, preset: Preset) -> int:
    made_for = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    sizes = [size for size in (made_for, preset.most_tokens) if size is not None]
    return max(2, min(sizes, default=_MOST_TOKENS))


def _options(made: Plan, option: Option) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if option.shares_prefix:
        # A store outlives calls: without a cap it would grow until nothing is left.
        options |= {"prefix_sharing": True, "max_tokens": made.predicted.max_tokens}
    if option.draft != "none":
        options["draft"] = option.draft
    return options
