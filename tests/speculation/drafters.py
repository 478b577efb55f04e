"""Drafters for tests: an assistant that is often right, and trees that hold the truth on one of their branches."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession, Plan, Read, Sampler
from tests.helpers import tiny_model


def noisy(kind: str = "full", noise: float = 0.05) -> PreTrainedModel:
    """Return `tiny_model(kind)` with disturbed weights: it agrees on most tokens, not on all."""
    model = tiny_model(kind)
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data += noise * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return model


class Forest(Drafter):
    """Trees around a known text: at each depth the true token and a wrong one, in turns first, each with a child."""

    can_tree = True

    def __init__(self, truth: Tensor, wrong_at: Sequence[int] = ()) -> None:
        self.truth = truth.tolist()  # [batch, length]
        self.wrong_at = wrong_at  # positions at which no branch holds the truth

    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        return _ForestSession(self, batch_size)


class _ForestSession(DraftSession):
    def __init__(self, forest: Any, batch_size: int) -> None:
        self.forest = forest
        self.rows = list(range(batch_size))
        self.lens = [0] * batch_size

    def extend(self, read: Read) -> None:
        for row, count in enumerate(read.counts):
            self.lens[row] += count + (self.lens[row] == 0)

    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        tokens: list[int] = []
        parents: list[int] = []
        above = -1
        for depth in range(plan.gamma):
            at = self.lens[0] + depth
            true = self.forest.truth[0][at] if at < len(self.forest.truth[0]) else 1
            true = (true + 7) % 97 if at in self.forest.wrong_at else true
            pair = [true, (true + 1) % 97]
            order = pair if depth % 2 else pair[::-1]
            first = len(tokens)
            tokens += order
            parents += [above, above]
            tokens.append((true + 5) % 97)  # a child of the wrong one
            parents.append(first + order.index(pair[1]))
            above = first + order.index(true)
        return Draft(torch.tensor([tokens]), torch.tensor([parents]))

    def select(self, rows: Sequence[int]) -> None:
        self.rows = [self.rows[row] for row in rows]
        self.lens = [self.lens[row] for row in rows]


class Oracle(Drafter):
    """Chains of a known text with occasional errors, at different positions in each row."""

    def __init__(self, truth: Tensor, every: int = 3) -> None:
        self.truth, self.every = truth.tolist(), every  # [batch, length]

    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        return _OracleSession(self, batch_size)


class _OracleSession(_ForestSession):
    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        return Draft(torch.tensor([[self._token(i, row, depth) for depth in range(plan.gamma)]
                                   for i, row in enumerate(self.rows)]))  # fmt: skip

    def _token(self, i: int, row: int, depth: int) -> int:
        at, text = self.lens[i] + depth, self.forest.truth[row]
        true = text[at] if at < len(text) else 1
        return true if (at + row) % self.forest.every else (true + 7) % 97
