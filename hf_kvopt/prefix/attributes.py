"""Text of the attributes of a model's modules and configs: equal text where a forward reads equal values.

    module ──► its class, settings (scaling, eps, training, ...), forward hooks, children, parameters, buffers, tensors
    config ──► its values, and the attention functions that its implementation names

Numbers, strings and containers of them are spelled out. Anything else has a number of its own, never given twice. A
module is described again only where one of its attributes was replaced; every walk visits all modules.
"""

from collections.abc import Collection, Iterator, Mapping
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.prefix.spelling import CONTAINERS, SCALARS, Found, Numbers, Reference, kind_of, reference, spell

# Attentions that compute the same but for rounding: a store that was loaded under one serves the others.
_EXACT_ATTENTIONS = ("eager", "sdpa", "hf_kvopt")
# Parts of a config that change nothing that is computed; the attention is described by its functions.
WITHOUT_MEANING = (
    "_name_or_path", "transformers_version", "architectures", "use_cache", "output_hidden_states",
    "_attn_implementation", "_attn_implementation_internal",
)  # fmt: skip
# Attributes of modules that no forward reads for what it computes, or that only say how it is differentiated.
_UNREAD = {
    "name_or_path", "generation_config", "warnings_issued", "prepare_inputs_for_generation", "_is_hf_initialized",
    "_output_capturing_hooks_installed", "gradient_checkpointing", "_gradient_checkpointing_func",
    "_require_grads_hook", "_require_grads_hooks",
}  # fmt: skip
# Keywords of the hooks by which PEFT sends the rows of a batch through adapters of their own.
_ROWWISE = ("adapter_names", "alora_offsets")
_INTERNAL = frozenset(nn.Module().__dict__) - {"training"}
# What transformers notes on a model about loading and placing it.
_OF_LOADING = {
    *(n for kind in PreTrainedModel.__mro__ if kind not in nn.Module.__mro__ for n in vars(kind) if n.startswith("_")),
    "all_tied_weights_keys", "_weight_conversions", "_use_kernels",
}  # fmt: skip
# What accelerate notes on a module about its device, methods of its own among them.
_OF_PLACING = {"hf_device_map", "_hf_hook", "_old_forward", *vars(nn.Module)}
# Modules of torch whose forward gathers weights that lie on many devices.
_SHARDED = ("FSDPModule", "FullyShardedDataParallel")
_PACKAGE = f"{__name__.partition('.')[0]}."
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_HOOKS_EVERYWHERE = ("_global_forward_pre_hooks", "_global_forward_hooks")
_PLACES = ("_parameters", "_buffers", "_modules")


class Walk(NamedTuple):
    """Findings of one look at a model.

    `texts` say all that is not in a tensor. `tensors` are its parameters, buffers and other tensors; one that is used
    twice is named twice. With `is_rowwise` a hook sends the rows of a batch through adapters of their own.
    """

    texts: list[str]
    tensors: list[Tensor]
    is_rowwise: bool
    is_elsewhere: bool  # weights are offloaded or sharded, and brought together when a forward needs them


class _Described:
    """The text of one module or config, true while its attributes are the very objects that were described.

    `changing` names the attributes that are left out, containers that may be written to in place. Tensors are not
    referred to, not even weakly, or torch could not swap them; where one was replaced, the text has another mark.
    """

    def __init__(self, owner: Any, numbers: Numbers, before: "_Described | None") -> None:
        attributes = dict(_attributes(owner))
        places = _PLACES if isinstance(owner, nn.Module) else ()
        self._owner, self._read = reference(owner), itemgetter(*places, *attributes)
        names, values = self._values_of(owner)
        self._ids = [*names, *map(id, values)]
        self._held: list[Any] = []
        self._others: list[Reference] = []
        self._tensors: list[int] = []  # indices in `values`, as those of modules and configs
        self._owners: list[int] = []
        self.changing: list[str] = []
        parts, found = [], Found()
        for i, (name, value) in enumerate(zip((*attributes, *names[1:]), values, strict=True)):
            if isinstance(value, CONTAINERS):
                self.changing.append(name)
                continue
            if isinstance(value, nn.Module | PreTrainedConfig):
                self._owners.append(i)
            elif isinstance(value, Tensor):
                self._tensors.append(i)
            elif isinstance(value, SCALARS):
                self._held.append(value)
            else:
                self._others.append(reference(value))
            parts.append(f"{name}={spell(value, numbers.of, found)}")
        self._tensors = [i for i in self._tensors if not values[i].is_meta]
        self._marked = [id(values[i]) for i in self._tensors]
        is_kept = before is not None and before._owner() is owner and before._marked == self._marked
        self._mark: int = before._mark if before is not None and is_kept else numbers.fresh()
        self.text = f"{numbers.of(owner)}:{numbers.of(type(owner))}:{self._mark} {' '.join(parts)}"

    def look(self, owner: Any) -> tuple[list[Tensor], list[Any]] | None:
        """Return the tensors, and the modules and configs, of `owner`; None where an attribute was replaced since."""
        if self._owner() is not owner:
            return None
        names, values = self._values_of(owner)
        if [*names, *map(id, values)] != self._ids:
            return None
        for ref in self._others:
            if ref() is None:  # its address may be another's by now
                return None
        return [values[i] for i in self._tensors], [values[i] for i in self._owners]

    def _values_of(self, owner: Any) -> tuple[list[Any], list[Any]]:
        """Return the number of attributes, the names of children and tensors, and what attributes and they refer to."""
        attributes = owner.__dict__
        try:
            read = self._read(attributes)
        except KeyError:
            return [], []
        if not isinstance(owner, nn.Module):
            return [len(attributes)], [*read]
        tensors, buffers, modules, *values = read
        names = [len(attributes), *tensors, *buffers, *modules]
        return names, [*values, *tensors.values(), *buffers.values(), *modules.values()]


class Attributes:
    """Walks over one model, and what is remembered from walk to walk. Holds no part of the model."""

    def __init__(self) -> None:
        self.numbers = Numbers()
        self.num_described = 0  # modules and configs, since the beginning
        self._known: dict[int, _Described] = {}

    def walk(self, model: PreTrainedModel) -> Walk:
        """Visit every module and config of `model`, those included that stand in plain attributes."""
        texts: list[str] = []
        tensors: list[Tensor] = []
        is_rowwise = False
        known, self._known = self._known, {}
        kinds: dict[type, None] = {}
        offloaded: dict[int, Any] = {}
        stack: list[Any] = [model]
        while stack:
            owner = stack.pop()
            if id(owner) in self._known:
                continue
            described = known.get(id(owner))
            seen = None if described is None else described.look(owner)
            if described is None or seen is None:
                described = _Described(owner, self.numbers, described)
                seen = described.look(owner) or ([], [])
                self.num_described += 1
            self._known[id(owner)] = described
            texts.append(described.text)
            tensors += seen[0]
            stack += seen[1]
            if described.changing:
                found, values = Found(), owner.__dict__
                texts += [f"{name}={spell(values[name], self.numbers.of, found)}" for name in described.changing]
                tensors += found.tensors
                stack += found.owners
            if isinstance(owner, PreTrainedConfig):
                texts += self._functions(owner)
                continue
            kinds[type(owner)] = None
            if "_hf_hook" in owner.__dict__:
                offloaded |= {id(place): place for place in _weights_elsewhere(owner._hf_hook)}
            if owner._forward_pre_hooks or owner._forward_hooks:
                is_rowwise |= self._spell_hooks(owner, texts)
        # Also where a class was patched, or hooks were put on all modules there are.
        texts += [f"forward {self.numbers.of(kind.forward)}" for kind in kinds]  # type: ignore[attr-defined]
        is_rowwise |= self._spell_hooks(None, texts)
        for weights in offloaded.values():
            tensors += [weight for weight in weights.values() if isinstance(weight, Tensor)]
        is_sharded = any(base.__name__ in _SHARDED for kind in kinds for base in kind.__mro__)
        return Walk(texts, tensors, is_rowwise, bool(offloaded) or is_sharded)

    def _spell_hooks(self, module: nn.Module | None, texts: list[str]) -> bool:
        """Add what tells these hooks from others; True where one sends rows through adapters of their own."""
        is_rowwise = False
        for key, hook in hooks_of(module):
            # Each registration has a key of its own, also one of a hook that was on before.
            texts.append(f"hook {key} {self.numbers.of(hook)}")
            is_rowwise |= _is_rowwise(hook)
        return is_rowwise

    def _functions(self, config: PreTrainedConfig) -> Iterator[str]:
        """The functions behind the name of the config's attention: a name may be registered anew."""
        if config._attn_implementation in _EXACT_ATTENTIONS:
            return
        for function in compat.attention_functions(str(config._attn_implementation)):
            yield f"attention {self.numbers.of(function)}"


def is_rowwise(model: nn.Module) -> bool:
    """Return whether a hook sends the rows of a batch through adapters of their own."""
    return any(_is_rowwise(hook) for module in (None, *model.modules()) for _, hook in hooks_of(module))


def _is_rowwise(hook: Any) -> bool:
    return any(name in _ROWWISE for name in getattr(hook, "keywords", ()))


def settings_of(module: nn.Module) -> tuple[str, list[Tensor]]:
    """Spell what the attributes of `module` say in any process, where it is placed left out; and their tensors."""
    found = Found()
    settings = [
        f"{name}={spell(value, kind_of, found)}"
        for name, value in _attributes(module)
        if name not in _OF_PLACING and not isinstance(value, torch.device)
    ]
    return f"{kind_of(module)} {' '.join(settings)}", found.tensors


def hooks_of(module: nn.Module | None) -> Iterator[tuple[int, Any]]:
    """Forward hooks of a module, those on all modules for None, by the key of their registration.

    Hooks that are known to change nothing are left out.
    """
    names = _HOOKS if module is not None else _HOOKS_EVERYWHERE
    for name in names:
        for key, hook in getattr(nn.modules.module if module is None else module, name).items():
            if getattr(hook, "__module__", None) not in compat.READING_HOOKS:
                yield key, hook


def _weights_elsewhere(hook: Any) -> Iterator[Mapping[str, Any]]:
    """Weights in memory that a hook of accelerate's places when its module runs; those on a disk are not read."""
    for each in getattr(hook, "hooks", (hook,)):
        if getattr(each, "offload", False):
            weights = getattr(each.weights_map, "dataset", None)
            weights = getattr(weights, "state_dict", weights)
            yield weights if isinstance(weights, Mapping) else {}


def _attributes(owner: Any) -> Iterator[tuple[str, Any]]:
    """Return what a forward may read from a module or config beside its children and tensors, by name."""
    hidden: Collection[str] = _INTERNAL | _UNREAD if isinstance(owner, nn.Module) else WITHOUT_MEANING
    if isinstance(owner, PreTrainedModel):
        hidden = {*hidden, *_OF_LOADING}
    for name, value in owner.__dict__.items():
        # This library's own overrides choose caches, not what is computed.
        is_ours = name.startswith("_hf_kvopt") or type(value).__module__.startswith(_PACKAGE)
        if name not in hidden and not is_ours:
            yield name, value
