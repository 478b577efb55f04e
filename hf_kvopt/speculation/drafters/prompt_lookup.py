"""Prompt lookup: if the last n-gram occurred earlier in the text, draft the tokens that followed it; no model is run.

Source: Saxena, "Prompt Lookup Decoding" (2023); transformers' `prompt_lookup_num_tokens`.
"""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession, Plan, Read, Sampler


class PromptLookup(Drafter):
    """Drafter that copies from the row's own text.

    Args:
        max_ngram: tokens that must match at most; the longest match wins, then the latest.
    """

    def __init__(self, max_ngram: int = 3) -> None:
        if max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1: got {max_ngram}")
        self.max_ngram = max_ngram

    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        return _LookupSession(self.max_ngram, batch_size)


class _LookupSession(DraftSession):
    def __init__(self, max_ngram: int, batch_size: int) -> None:
        self.max_ngram = max_ngram
        self.texts: list[list[int]] = [[] for _ in range(batch_size)]
        # N-gram -> where it last ended; an n-gram at the end of the text is not entered yet.
        self.ends: list[dict[tuple[int, ...], int]] = [{} for _ in range(batch_size)]
        self.device = torch.device("cpu")

    def extend(self, read: Read) -> None:
        self.device = read.tokens.device
        firsts = read.tokens[:, :1].tolist()
        for row, (first, following) in enumerate(zip(firsts, read.following.tolist(), strict=True)):
            text, ends = self.texts[row], self.ends[row]
            if not text:
                text += first
            for token in following[: read.counts[row]]:
                for n in range(1, min(self.max_ngram, len(text)) + 1):
                    ends[tuple(text[-n:])] = len(text)
                text.append(token)

    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        found = [self._behind(row, plan.gamma) for row in range(len(self.texts))]
        width = max(len(tokens) for tokens in found)
        padded = [tokens + [0] * (width - len(tokens)) for tokens in found]
        tokens = torch.tensor(padded, dtype=torch.long, device=self.device).view(len(found), width)
        return Draft(tokens, lengths=[len(tokens) for tokens in found])

    def select(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]
        self.ends = [self.ends[row] for row in rows]

    def _behind(self, row: int, gamma: int) -> list[int]:
        text, ends = self.texts[row], self.ends[row]
        for n in range(min(self.max_ngram, len(text)), 0, -1):
            end = ends.get(tuple(text[-n:]))
            if end is not None:
                # A copy that reaches the end of the text repeats itself, so that a loop is drafted as a loop.
                period = len(text) - end
                return [text[end + i % period] for i in range(gamma)]
        return []
