"""Lookahead decoding: the target guesses its own future by Jacobi iteration, and what it guessed is drafted later.

Each verification gives the target's choice behind every drafted token, whether that token was right or not. These
choices are the next guess of the same positions (one Jacobi step), and token by token they spell n-grams that the
model likes; those that begin with the root are drafted first, the newest guess behind them (Fu et al.,
arXiv:2402.02057; the window here is the draft itself, so that a forward reads no more than gamma + 1 tokens).
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession, Plan, Read, Sampler

_NUM_NGRAMS = 4096


class Lookahead(Drafter):
    """Drafts from the target's own guesses.

    Args:
        ngram: tokens of the n-grams that are collected, the first one included.
    """

    def __init__(self, ngram: int = 4) -> None:
        if ngram < 2:
            raise ValueError(f"ngram must be at least 2: got {ngram}")
        self.ngram = ngram

    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        return _LookaheadSession(self.ngram, batch_size)


class _LookaheadSession(DraftSession):
    def __init__(self, ngram: int, batch_size: int) -> None:
        self.ngram = ngram
        self.texts: list[list[int]] = [[] for _ in range(batch_size)]
        # What followed a token in a trajectory, newest last; one pool, as rows of a batch are often alike.
        self.pool: OrderedDict[int, list[int]] = OrderedDict()
        self.guesses: list[list[int]] = [[] for _ in range(batch_size)]  # behind the root of each row
        self.drafted: list[list[int]] = [[] for _ in range(batch_size)]
        self.device = torch.device("cpu")

    def extend(self, read: Read) -> None:
        self.device = read.tokens.device
        choices = None if read.choices is None else read.choices.tolist()
        firsts = read.tokens[:, :1].tolist()
        for row, following in enumerate(read.following.tolist()):
            new = following[: read.counts[row]]
            text = self.texts[row]
            if not text:
                text += firsts[row]
            start = max(0, len(text) - self.ngram)
            text += new
            self._collect(text[start:])
            if choices is not None and self.drafted[row]:
                self._follow(row, choices[row], len(new))

    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        self.drafted = [self._guess(row, plan.gamma) for row in range(len(self.texts))]
        return Draft(torch.tensor(self.drafted, dtype=torch.long, device=self.device))

    def select(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]
        self.guesses = [self.guesses[row] for row in rows]
        self.drafted = [self.drafted[row] for row in rows]

    def _follow(self, row: int, choices: Sequence[int], num_new: int) -> None:
        """One Jacobi step: the choices behind what was drafted are the next guess, and spell n-grams."""
        drafted = self.drafted[row]
        # choices[i] stands behind drafted[i - 1]: pairs of the two trajectories.
        for i, token in enumerate(drafted[: len(choices) - 1]):
            if i + 1 >= num_new:
                self._note([token, *choices[i + 1 : i + 2]])
        self.guesses[row] = list(choices[num_new:])
        self.drafted[row] = []

    def _collect(self, text: Sequence[int]) -> None:
        for start in range(len(text) - self.ngram + 1):
            self._note(text[start : start + self.ngram])

    def _note(self, ngram: Sequence[int]) -> None:
        known = self.pool.get(ngram[0])
        # A longer n-gram is not forgotten for a shorter one that it begins with.
        if known is not None and list(known[: len(ngram) - 1]) == list(ngram[1:]):
            return
        self.pool[ngram[0]] = list(ngram[1:])
        self.pool.move_to_end(ngram[0])
        if len(self.pool) > _NUM_NGRAMS:
            self.pool.popitem(last=False)

    def _guess(self, row: int, gamma: int) -> list[int]:
        """Collected n-grams chained behind the root; where none begins, the guess of the last step, then repetition."""
        text, guesses = self.texts[row], self.guesses[row]
        tokens: list[int] = []
        while len(tokens) < gamma:
            known = self.pool.get(tokens[-1] if tokens else text[-1])
            if known is not None:
                tokens += known
            elif len(tokens) < len(guesses):
                tokens.append(guesses[len(tokens)])
            else:
                tokens.append(tokens[-1] if tokens else text[-1])
        return tokens[:gamma]
