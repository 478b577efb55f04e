"""Adapters with the attributes and the per-row hooks of PEFT's LoRA layers, without PEFT."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


class LoraLinear(nn.Module):
    """`base_layer`, and what the active adapters add to it."""

    def __init__(self, base_layer: nn.Linear, names: Sequence[str]) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.scaling = dict.fromkeys(names, 2.0)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        for name in names:
            self.lora_A[name] = nn.Linear(base_layer.in_features, 2, bias=False)
            self.lora_B[name] = nn.Linear(2, base_layer.out_features, bias=False)
        self._active_adapter: list[str] = [names[0]]
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def delta(self, name: str) -> Tensor:
        """What an adapter adds to the weight."""
        return self.lora_B[name].weight @ self.lora_A[name].weight * self.scaling[name]

    @torch.no_grad()
    def merge(self) -> None:
        """Write the active adapters into the weight."""
        for name in self._active_adapter:
            self.base_layer.weight.data += self.delta(name)
            self.merged_adapters.append(name)

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        """Apply the active adapters, or to each row its own."""
        out = self.base_layer(x)
        if adapter_names is not None:
            rows = [row + each @ self.delta(name).T for row, each, name in zip(out, x, adapter_names, strict=True)]
            return torch.stack(rows)
        if self._disable_adapters:
            return out
        for name in self._active_adapter:
            if name in self.lora_A and name not in self.merged_adapters:
                out = out + x @ self.delta(name).T
        return out


def adapt(model: PreTrainedModel, *names: str) -> PreTrainedModel:
    """Put adapters of these names on the keys and values of every layer."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for layer in model.model.layers:
            for name in ("k_proj", "v_proj"):
                setattr(layer.self_attn, name, LoraLinear(getattr(layer.self_attn, name), names))
    return model


def adapters_of(model: PreTrainedModel) -> list[LoraLinear]:
    """The layers that `adapt` has put in."""
    return [module for module in model.modules() if isinstance(module, LoraLinear)]


def _inject(module: nn.Module, args: Any, kwargs: dict[str, Any], adapter_names: Sequence[str]) -> Any:
    return args, {**kwargs, "adapter_names": adapter_names}


@contextmanager
def by_row(model: PreTrainedModel, *adapter_names: str) -> Iterator[None]:
    """Send each row through its own adapter, as PEFT's `generate(adapter_names=...)` does."""
    hooks = [
        layer.register_forward_pre_hook(partial(_inject, adapter_names=adapter_names), with_kwargs=True)
        for layer in adapters_of(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
