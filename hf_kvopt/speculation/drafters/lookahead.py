"""Lookahead decoding: the target guesses its own next tokens by Jacobi iteration, and its guesses are drafted later.

Each verification gives the target's choice after every drafted token, whether that token was right or not. These
choices are the next guess for the same positions (one Jacobi step), and consecutive ones form n-grams that the model
finds likely. N-grams that begin with the root are drafted first, then the newest guess (Fu et al., arXiv:2402.02057;
here the window is the draft itself, so a forward reads at most gamma + 1 tokens).
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession, Plan, Read, Sampler

_NUM_NGRAMS = 4096


class Lookahead(Drafter):
    """Drafter that proposes the target's own guesses.

    Args:
        ngram: length of the collected n-grams in tokens.
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
        # First token -> the tokens that followed it, oldest entry first. All rows share the pool, as rows of a batch
        # are often alike.
        self.pool: OrderedDict[int, list[int]] = OrderedDict()
        self.guesses: list[list[int]] = [[] for _ in range(batch_size)]  # guesses after the root of each row
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
        """Make one Jacobi step: the choices after the drafted tokens are the next guess and new n-grams."""
        drafted = self.drafted[row]
        # choices[i] comes after drafted[i - 1].
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
        # A known n-gram is kept when the new one is only its prefix.
        if known is not None and list(known[: len(ngram) - 1]) == list(ngram[1:]):
            return
        self.pool[ngram[0]] = list(ngram[1:])
        self.pool.move_to_end(ngram[0])
        if len(self.pool) > _NUM_NGRAMS:
            self.pool.popitem(last=False)

    def _guess(self, row: int, gamma: int) -> list[int]:
        """Chain collected n-grams after the root; without one, take the last guess, then repeat the last token."""
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
