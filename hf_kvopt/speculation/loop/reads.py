"""Builds the `Read` of each verification, and keeps it while nothing is drafted."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.speculation.drafters.base import Read


def features_of(outputs: Any, layers: Sequence[int]) -> Tensor | None:
    """Return features [batch, q_len, len(layers) * hidden_size] from the target's outputs, or None without layers.

    Raises:
        ValueError: the target returned no hidden states.
    """
    if not layers:
        return None
    states = getattr(outputs, "hidden_states", None)
    if states is None:
        raise ValueError(
            f"the draft head reads hidden states {tuple(layers)} of the target: got a model that returns none for "
            "output_hidden_states=True; use a drafter without features (an assistant model, 'prompt_lookup')"
        )
    picked = [states[layer] for layer in layers]
    return picked[0] if len(picked) == 1 else torch.cat(picked, dim=-1)


def packed(
    fed: Tensor,  # [batch, q_len]
    following: Sequence[Sequence[int]],
    nodes: Sequence[Sequence[int]],
    positions: Sequence[int],
    features: Tensor | None,  # [batch, q_len, width]
    choices: Tensor | None,
) -> Read:
    """Return a `Read` of the tokens numbered in `nodes` of each row, the first one at `positions`."""
    counts = [len(row) for row in nodes]
    width = max(counts)
    steps = range(width)
    index = torch.tensor([list(row) + [0] * (width - len(row)) for row in nodes], device=fed.device)
    behind = torch.tensor([list(row) + [0] * (width - len(row)) for row in following], device=fed.device)
    if all(list(row) == list(range(len(row))) for row in nodes):
        tokens, picked = fed[:, :width], None if features is None else features[:, :width]
    else:
        rows = torch.arange(len(fed), device=fed.device)[:, None]
        tokens, picked = fed[rows, index], None if features is None else features[rows, index]
    places = torch.tensor([[first + step for step in steps] for first in positions], device=fed.device)
    return Read(tokens, behind, places, picked, counts, choices)


class Pending:
    """Reads that the drafter was not told yet, because no draft was needed."""

    def __init__(self) -> None:
        self.reads: list[Callable[[], Read]] = []

    def __bool__(self) -> bool:
        return bool(self.reads)

    def add(self, read: Read) -> None:
        """Keep `read` for later."""
        self.reads.append(lambda: read)

    def add_later(self, make: Callable[[], Read]) -> None:
        """Keep a read that is made when it is taken: a plain step then takes no longer than without a drafter."""
        self.reads.append(make)

    def take(self) -> Read:
        """Return all reads as one, and forget them."""
        reads, self.reads = [make() for make in self.reads], []
        if len(reads) == 1:
            return reads[0]
        counts = [sum(read.counts[row] for read in reads) for row in range(len(reads[0].counts))]
        by_read = [read.counts for read in reads]
        features = None
        if reads[0].features is not None:
            features = _join([read.features for read in reads if read.features is not None], by_read)
        tokens, following, positions = (
            _join([getattr(read, part) for read in reads], by_read) for part in ("tokens", "following", "positions")
        )
        return Read(tokens, following, positions, features, counts, reads[-1].choices)


def _join(parts: Sequence[Tensor], counts: Sequence[Sequence[int]]) -> Tensor:
    """Concatenate right-padded tensors [batch, width, ...] row by row, without the padding between them."""
    rows = [
        torch.cat([part[row, : count[row]] for part, count in zip(parts, counts, strict=True)])
        for row in range(len(parts[0]))
    ]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
