"""Input of a plan: model, device, workload, and the sizes that follow from them."""

import inspect
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from hf_kvopt import compat
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.plan.capacity import CARD_SHARE
from hf_kvopt.plan.devices import Device, get_device
from hf_kvopt.plan.geometry import LayerKV, layers_of
from hf_kvopt.plan.inputs import BadInput, parse_bytes, parse_tokens, require_positive, show_bytes
from hf_kvopt.plan.layout import Layout, layouts
from hf_kvopt.plan.memory import chosen_dtype, encoder_tokens
from hf_kvopt.plan.model_config import load_config
from hf_kvopt.plan.weights import Weights, count_weights, model_class, require_kv_cache
from hf_kvopt.plan.workloads import WORKLOADS, Workload
from hf_kvopt.prefix.identity import require_shareable
from hf_kvopt.quant import get_kv_format

GOALS = ("latency", "throughput")
# Ordered by loss, as measured on a small model and published by others: the least lossy first.
FORMATS = ("native", "int8", "k8v4", "int4")
# From this length on, a row has a thousand blocks of 16.
LONG_ROW = 16384
# Queries of a row that attend to latents directly (attention/mla.py); with more, latents are expanded.
MOST_ABSORBED = 16


def seals(format: str) -> bool:
    """Return whether a format seals whole blocks, which latents do not have."""
    return get_kv_format(format).sealed is not None


@dataclass(frozen=True)
class Setup:
    """Checked input of a plan."""

    config: Any
    layers: tuple[LayerKV, ...]
    weights: Weights
    dtype: torch.dtype
    device: Device
    workload: str
    goal: str
    batch: int
    context: int
    encoder: int | None  # tokens of the encoder; None without one
    budget: int  # bytes of one device
    fixed: bool  # a cache of fixed addresses may be chosen

    @property
    def work(self) -> Workload:
        """Numbers of the workload."""
        return WORKLOADS[self.workload]

    @property
    def new_tokens(self) -> int:
        """Tokens that a request generates."""
        return min(self.work.new_tokens, self.context // 2)

    @property
    def prompt(self) -> int:
        """Tokens of the prompt."""
        return self.context - self.new_tokens

    @property
    def max_positions(self) -> int | None:
        """Tokens that the model was trained for; None if the config does not say."""
        return vars(self.config.get_text_config(decoder=True)).get("max_position_embeddings")

    @cached_property
    def formats(self) -> tuple[str, ...]:
        """Formats that differ for this model, and can pack its channels."""
        paged = [layer for layer in self.layers if layer.is_paged]
        is_odd = any(n % 2 for layer in paged for n in (layer.key_dim, layer.value_dim))
        return tuple(name for name in FORMATS if not (seals(name) and (is_odd or self.has_latents)))

    @cached_property
    def takes_attention(self) -> bool:
        """Return whether the model's attention can be chosen, and reads all keys."""
        model = model_class(self.config)
        indexed = any(layer.has_kv and not layer.is_paged for layer in self.layers)
        return not indexed and model is not None and compat.can_choose_attention(model)

    def expands(self, tokens_per_row: int) -> bool:
        """Return whether a step of `tokens_per_row` tokens expands latents, as attentions other than ours always do."""
        is_absorbed = self.takes_attention and not self.weights.packs_latents and tokens_per_row <= MOST_ABSORBED
        return self.has_latents and not is_absorbed

    @property
    def has_latents(self) -> bool:
        """Return whether some layer stores latents."""
        return any(layer.attention == "MLA" for layer in self.layers)

    @property
    def has_states(self) -> bool:
        """Return whether some layer keeps a recurrent state, which cannot be cut by token."""
        return any("states" in layer.kind for layer in self.layers)

    @property
    def slides(self) -> bool:
        """Return whether some layer has a window."""
        return any(layer.window is not None for layer in self.layers)

    @cached_property
    def why_not_shared(self) -> str | None:
        """Reason for which this model refuses `prefix_sharing=True`; None if it accepts."""
        model = model_class(self.config)
        try:
            require_shareable(self.config, None if model is None else inspect.signature(model.forward).parameters)
        except UnsupportedModel as refused:
            return str(refused).partition(": got ")[2].partition(";")[0]
        if self.config.get_text_config(decoder=True).model_type in compat.FORGETFUL:
            return "its layers forget their states where several tokens are read at once"
        return None

    def block_size(self, shares_prefix: bool) -> int:
        """Return the block size: small blocks share in small steps, large ones keep the table of a long row short."""
        return 16 if shares_prefix or self.context < LONG_ROW else 64

    def layouts(self) -> list[Layout]:
        """Return the possible layouts, the preferred ones first."""
        return layouts(self.weights, self.layers, self.device)

    def fits(self, layout: Layout, kv_bytes: float) -> bool:
        """Return whether the fullest device of `layout` holds its share of the weights and of `kv_bytes`."""
        return layout.fullest(self.weights, kv_bytes, len(self.layers)) <= self.budget


def set_up(
    model: Any,
    device: str | Device,
    context: int | str,
    batch: int,
    workload: str,
    goal: str,
    budget: int | str | None,
    dtype: torch.dtype | str | None,
    fixed: bool = True,
) -> Setup:
    """Check the arguments of `plan`, and return them with what follows from them.

    Raises:
        BadInput, UnsupportedModel: an argument or the model cannot be used.
    """
    config = load_config(model)
    require_kv_cache(config)
    for name, value, known in (("workload", workload, tuple(WORKLOADS)), ("goal", goal, GOALS)):
        if value not in known:
            raise BadInput(f"{name} must be one of {', '.join(known)}: got {value!r}; for example {name}={known[0]!r}")
    tokens = parse_tokens(context, "context")
    if tokens < 2:
        raise BadInput("context must hold a prompt and a new token: got 1; for example context='4k'")
    place = get_device(device) if isinstance(device, str) else device
    precision = chosen_dtype(dtype, config)
    weights = count_weights(config, precision, place)
    if weights is None:
        raise BadInput(f"the weights of this {config.model_type} cannot be counted from its config: nothing to plan by")
    return Setup(
        config=config,
        layers=tuple(layers_of(config)),
        weights=weights,
        dtype=precision,
        device=place,
        workload=workload,
        goal=goal,
        batch=require_positive(batch, "batch", 8),
        context=tokens,
        encoder=encoder_tokens(config, tokens, None),
        budget=parse_bytes(budget, "budget") if budget is not None else int(place.memory_bytes * CARD_SHARE),
        fixed=fixed,
    )


def require_layout(setup: Setup, smallest_kv: int) -> Layout:
    """Return the first layout that holds the weights and the smallest cache.

    Raises:
        BadInput: no layout does.
    """
    found = next((layout for layout in setup.layouts() if setup.fits(layout, smallest_kv)), None)
    if found is not None:
        return found
    weights, needed = setup.weights.num_bytes, setup.weights.num_bytes + smallest_kv
    many = setup.layouts()[-1].count
    hold, each = (
        (f"{many} of {setup.device.name} hold", " a device") if many > 1 else (f"{setup.device.name} holds", "")
    )
    raise BadInput(
        f"budget of {show_bytes(setup.budget)}{each} is impossible: weights take {show_bytes(weights)}, and with the "
        f"smallest cache {show_bytes(needed)} are needed, more than {hold}; expected for example "
        f"budget='{-(-needed * 5 // 4 // many // 2**30)}GiB', a smaller model, or a shorter context"
        + "".join(f" ({note})" for note in setup.weights.notes)
    )
