"""States of layers in the file of a prefix store: tensors by node, number of tokens, layer and part.

"states 12 16 0 0 conv"      node 12 of the manifest, behind 16 of its tokens; layer 0 of those with states, state 0
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.cache.hybrid import HybridLayer
from hf_kvopt.cache.states import RowStates, State, StateLayer
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.node import Node
from hf_kvopt.prefix.shared_blocks import SharedBlocks, device_of

_PARTS = ("conv", "recurrent")


def states_of(nodes: Sequence[Node]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Return what the manifest says of the states of `nodes`, and their tensors by name."""
    entries: list[dict[str, Any]] = []
    tensors: dict[str, Tensor] = {}
    for number, node in enumerate(nodes):
        for count, row in node.states.items():
            flags = [[state.has_previous for state in states] for states in row]
            entries.append({"node": number, "count": count, "has_previous": flags})
            for place, states in enumerate(row):
                for idx, state in enumerate(states):
                    for part in _PARTS:
                        tensor = getattr(state, part)
                        if tensor is not None:
                            tensors[_name(number, count, place, idx, part)] = tensor.cpu().contiguous()
    return entries, tensors


def put_states(
    blocks: SharedBlocks,
    cache: PrefixSharedCache,
    entries: Sequence[dict[str, Any]],
    tensors: dict[str, Tensor],
    texts: Sequence[tuple[Hashable, Sequence[int]]],
    lengths: Sequence[int],
) -> None:
    """Let the index know the states that a file holds.

    Args:
        cache: a blank one, that says which layers hold states.
        entries: what the manifest says of them.
        texts: key and tokens up to the end of each node.
        lengths: tokens of each node alone.
    """
    model = blocks.model
    assert model is not None  # a store without one holds no states
    homes = [
        device_of(model, i)
        for i, layer in enumerate(cache.layers)
        if isinstance(layer.states if isinstance(layer, HybridLayer) else layer, StateLayer)
    ]
    for entry in entries:
        number, count = entry["node"], entry["count"]
        key, tokens = texts[number]
        row = _row(entry, tensors, homes)
        blocks.index.keep_states(key, tokens[: len(tokens) - lengths[number] + count], row)


def _row(entry: dict[str, Any], tensors: dict[str, Tensor], homes: Sequence[torch.device]) -> RowStates:
    row = []
    for place, (flags, home) in enumerate(zip(entry["has_previous"], homes, strict=True)):
        states = []
        for idx, flag in enumerate(flags):
            found = [tensors.get(_name(entry["node"], entry["count"], place, idx, part)) for part in _PARTS]
            conv, recurrent = (None if tensor is None else tensor.to(home) for tensor in found)
            states.append(State(conv, recurrent, flag))
        row.append(tuple(states))
    return tuple(row)


def _name(number: int, count: int, place: int, idx: int, part: str) -> str:
    return f"states {number} {count} {place} {idx} {part}"
