"""PressPolicy: the score of a press of kvpress, with blocks that really go back.

    press.score(module, hidden_states, keys, values, attentions, kwargs) ─► the best of each KV head ─► our blocks

kvpress (github.com/NVIDIA/kvpress) replaces `cache.layers[i].keys` behind each layer, which a paged cache refuses. Its
presses know how to score, so they are asked for that alone. What they go by beside keys and values, the inputs of the
attention modules, is noted by hooks on the model.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hf_kvopt.eviction.policy import PromptStates
from hf_kvopt.eviction.scores import PromptPolicy


class PressPolicy(PromptPolicy):
    """Keep of a prompt what a press of kvpress scores highest; a share of `1 - press.compression_ratio`.

    Args:
        press: an object with `score` as kvpress' ScorerPress has it, and `compression_ratio`. Presses that change keys,
            mask heads or wrap others have no score of their own.
        model: whose attention modules are hooked, until `close`.

    Raises:
        TypeError: an object without such a score.
        ValueError: a ratio that keeps nothing, or a model in which no attention module was found.

    No attention weights are handed to the press: presses that have no other way (ObservedAttention) fail by themselves.

    Source: kvpress 0.5.5, github.com/NVIDIA/kvpress.

    Examples:
        >>> from hf_kvopt import enable
        >>> class Newest:  # or kvpress.SnapKVPress(compression_ratio=0.5)
        ...     compression_ratio = 0.5
        ...
        ...     def score(self, module, hidden_states, keys, values, attentions, kwargs):
        ...         return torch.arange(keys.shape[2]).float().expand(keys.shape[:3])
        >>> policy = PressPolicy(Newest(), model)
        >>> output = enable(model, policy=policy).generate(**inputs)
        >>> policy.close()
    """

    def __init__(self, press: Any, model: nn.Module) -> None:
        ratio = getattr(press, "compression_ratio", None)
        if not callable(getattr(press, "score", None)) or ratio is None:
            raise TypeError(
                f"a press needs score(...) and compression_ratio, as kvpress' ScorerPress has them: got "
                f"{type(press).__name__}; wrappers of other presses have none, hand over what they wrap"
            )
        if not 0 <= ratio < 1:
            raise ValueError(f"compression_ratio must be a share from 0 to below 1: got {ratio}")
        self.press, self.keep = press, 1 - ratio
        self._inputs: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()
        modules = [module for module in model.modules() if type(module).__name__.endswith("Attention")]
        if not modules:
            raise ValueError(f"a press scores by attention modules: got {type(model).__name__}, where none was found")
        rotary = next((m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")), None)
        for module in modules:
            if rotary is not None and not hasattr(module, "rotary_emb"):
                module.__dict__["rotary_emb"] = rotary  # where presses look for it; no submodule, no weights
        self._hooks = [module.register_forward_pre_hook(self._note, with_kwargs=True) for module in modules]

    def __repr__(self) -> str:
        return f"PressPolicy({self.press})"

    def close(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        self._inputs.clear()

    def budget(self, length: int) -> int:
        return max(1, int(length * self.keep))

    @torch.no_grad()
    def score_states(self, states: PromptStates) -> Tensor:
        noted = self._inputs.get(states.module)
        if noted is None:
            raise ValueError(
                f"{self} was closed, or made for another model: got a prompt of {type(states.module).__name__} whose "
                "inputs nobody noted; make the policy from the model that reads the prompt"
            )
        row, pads = states.row, states.pads
        own = {name: _of_row(value, row, pads) for name, value in noted.items()}
        keys, values = states.k[None], states.v[None]
        scores: Tensor = self.press.score(states.module, own.get("hidden_states"), keys, values, None, own)[0]
        if scores.shape != states.k.shape[:2]:
            raise ValueError(
                f"a score must be [1, num_kv_heads, tokens] = {[1, *states.k.shape[:2]]}: got {[1, *scores.shape]} of "
                f"{self.press}"
            )
        return scores

    def _note(self, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        hidden_states = kwargs.get("hidden_states", args[0] if args else None)
        if isinstance(hidden_states, Tensor) and hidden_states.shape[1] > 1:
            noted = {"hidden_states": hidden_states, "position_embeddings": kwargs.get("position_embeddings")}
            self._inputs[module] = {name: value for name, value in noted.items() if value is not None}
        else:
            self._inputs.pop(module, None)  # a step: nothing is scored, and nothing held


def _of_row(value: Any, row: int, pads: int) -> Any:
    """Return what [batch | 1, columns, ...] holds of one row, without its padding; tuples are taken apart."""
    if isinstance(value, tuple):
        return tuple(_of_row(each, row, pads) for each in value)
    index = min(row, len(value) - 1)
    return value[index : index + 1, pads:]
