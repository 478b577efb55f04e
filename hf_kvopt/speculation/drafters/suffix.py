"""Suffix lookup: draft what followed the longest earlier match of the text's end, in the text or in earlier outputs.

    text   ... a b c d e ... x b c d e ... b c d|          places after "b c d" vote for the next token;
    votes        (4)^e         (3)^e                       the longest matches count alone

A token's probability is its share of the votes times what matches of that length were worth so far, so that a chain can
end where one more column of the batch costs more than it is expected to give. Outputs of earlier calls are kept, up to
a number of tokens, apart for each tenant.

Source: SuffixDecoding, arXiv:2411.04975, with an index of short n-grams in place of its suffix tree.
"""

from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable, Sequence

import torch
from transformers import PreTrainedModel

from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession, Plan, Read, Sampler

_GRAMS = (6, 3, 2, 1)  # lengths of the indexed n-grams; the longest that is found is extended to the left
_PLACES = 16  # newest places kept of each n-gram
_LONGEST = 32  # tokens of a match that are compared
_BETWEEN = -1  # stands between the texts of a history; no token
# Prior acceptance by length of the match (1, 2, 3 to 4, 5 to 8, 9 to 16, longer), with the weight of four tries; on the
# texts of tests/speculation/test_suffix.py.
_PRIORS = (0.15, 0.35, 0.55, 0.7, 0.8, 0.9)
_PRIOR_WEIGHT = 4.0
_MOST_TENANTS = 64


class Texts:
    """Tokens one after another, with an index of the places behind each short n-gram."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._places: dict[tuple[int, ...], list[int]] = {}

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens; an n-gram at the very end is entered when a token follows it."""
        held, places = self.tokens, self._places
        for token in tokens:
            end = len(held)
            for n in _GRAMS:
                if n <= end:
                    found = places.setdefault(tuple(held[end - n :]), [])
                    found.append(end)
                    if len(found) > 2 * _PLACES:
                        del found[:-_PLACES]
            held.append(token)

    def matches(self, text: Sequence[int], end: int) -> tuple[int, list[int]]:
        """Return the length of the longest match of the end of `text` before place `end`, and the places behind it."""
        for n in _GRAMS:
            if n > len(text):
                continue
            places = [place for place in self._places.get(tuple(text[-n:]), ())[-_PLACES:] if place < end]
            if places:
                lengths = [self._length(text, place, n) for place in places]
                longest = max(lengths)
                return longest, [place for place, length in zip(places, lengths, strict=True) if length == longest]
        return 0, []

    def _length(self, text: Sequence[int], place: int, known: int) -> int:
        held, limit = self.tokens, min(_LONGEST, place, len(text))
        while known < limit and held[place - 1 - known] == text[-1 - known] != _BETWEEN:
            known += 1
        return known


class History:
    """Outputs of earlier calls; a full half is dropped when as many tokens have been added again.

    Args:
        max_tokens: most tokens to keep.
    """

    def __init__(self, max_tokens: int) -> None:
        self._half = max(1, max_tokens // 2)
        self.parts = [Texts(), Texts()]  # older, newer

    def add(self, tokens: Sequence[int]) -> None:
        """Keep the end of an output."""
        if len(self.parts[1].tokens) + len(tokens) > self._half:
            self.parts = [self.parts[1], Texts()]
        self.parts[1].add([*tokens[-self._half + 1 :], _BETWEEN])


class SuffixLookup(Drafter):
    """Drafter that copies from the row's own text and from earlier outputs; no model is run.

    Args:
        history_tokens: tokens of earlier outputs to keep for each tenant; 0 keeps none.
        tenant: returns the key of the calling tenant, whose outputs no other tenant is shown; None: all are one.

    Raises:
        ValueError: history_tokens is negative.
    """

    max_gamma = 16  # copies are long: code edits accept 11.4 tokens of at most 16, and 6.6 of at most 8

    def __init__(self, history_tokens: int = 65_536, tenant: Callable[[], Hashable] | None = None) -> None:
        if history_tokens < 0:
            raise ValueError(f"history_tokens must be 0 or more: got {history_tokens}")
        self.history_tokens, self.tenant = history_tokens, tenant
        self.worth = [[_PRIOR_WEIGHT * prior, _PRIOR_WEIGHT] for prior in _PRIORS]  # [accepted, tried] by match length
        self._histories: OrderedDict[Hashable, History] = OrderedDict()

    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        return _SuffixSession(self, self.history() if self.history_tokens else None, batch_size)

    def history(self) -> History:
        """Return the history of the calling tenant; that of the tenant unseen for longest is dropped for a new one."""
        key = None if self.tenant is None else self.tenant()
        history = self._histories.pop(key, None) or History(self.history_tokens)
        self._histories[key] = history
        if len(self._histories) > _MOST_TENANTS:
            self._histories.popitem(last=False)
        return history


class _SuffixSession(DraftSession):
    """Texts of the rows; `drafted` holds (token, class of its match) of the last draft of each row."""

    def __init__(self, drafter: SuffixLookup, history: History | None, batch_size: int) -> None:
        self.drafter, self.history = drafter, history
        self.texts = [Texts() for _ in range(batch_size)]
        self.prompt_lens = [0] * batch_size
        self.drafted: list[list[tuple[int, int]]] = [[] for _ in range(batch_size)]
        self.device = torch.device("cpu")

    def extend(self, read: Read) -> None:
        self.device = read.tokens.device
        firsts = read.tokens[:, 0].tolist()
        for row, (first, following) in enumerate(zip(firsts, read.following.tolist(), strict=True)):
            text, new = self.texts[row], following[: read.counts[row]]
            if not text.tokens:
                text.add([first])
                self.prompt_lens[row] = len(new)
            text.add(new)
            self._learn(row, new)

    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        grown = [self._grow(row, plan.gamma) for row in range(len(self.texts))]
        width = 0
        # A column is read for all rows: it is worth its time by the sum of what they expect of it.
        while width < plan.gamma:
            alive = sum(joint[width] for _, joint in grown if len(joint) > width)
            if alive <= 0 or alive < plan.min_confidence * len(grown):
                break
            width += 1
        self.drafted = [tokens[:width] for tokens, _ in grown]
        rows = [[token for token, _ in tokens] for tokens in self.drafted]
        width = max(map(len, rows), default=0)
        padded = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long, device=self.device)
        return Draft(padded.view(len(rows), width), lengths=[len(row) for row in rows])

    def select(self, rows: Sequence[int]) -> None:
        for row in set(range(len(self.texts))) - set(rows):
            self._remember(row)
        self.texts = [self.texts[row] for row in rows]
        self.prompt_lens = [self.prompt_lens[row] for row in rows]
        self.drafted = [self.drafted[row] for row in rows]

    def close(self) -> None:
        for row in range(len(self.texts)):
            self._remember(row)

    def _grow(self, row: int, gamma: int) -> tuple[list[tuple[int, int]], list[float]]:
        """Return drafted tokens with the classes of their matches, and their joint probabilities."""
        own = self.texts[row]
        length, places, source = *own.matches(own.tokens, len(own.tokens)), own
        for part in self.history.parts if self.history is not None else ():
            found = part.matches(own.tokens, len(part.tokens))
            if found[0] > length:
                length, places, source = *found, part
        held, size = source.tokens, len(source.tokens)
        tokens: list[tuple[int, int]] = []
        joints: list[float] = []
        joint = 1.0
        while len(tokens) < gamma and places:
            # A copy that reaches the end of the row's own text goes on in what is drafted: a loop stays a loop.
            behind = [held[p] if p < size else tokens[p - size][0] for p in places if p < size or source is own]
            votes = Counter(token for token in behind if token != _BETWEEN)
            if not votes:
                break
            most = max(votes.values())
            token = next(token for token in reversed(behind) if votes[token] == most)
            kind = _class_of(length)
            accepted, tried = self.drafter.worth[kind]
            joint *= most / len(behind) * accepted / tried
            tokens.append((token, kind))
            joints.append(joint)
            places = [p + 1 for p, t in zip(places, behind, strict=False) if t == token]
            length += 1
        return tokens, joints

    def _learn(self, row: int, new: Sequence[int]) -> None:
        """Note which of the drafted tokens were accepted, by the class of their match."""
        for (token, kind), true in zip(self.drafted[row], new, strict=False):
            worth = self.drafter.worth[kind]
            worth[0] = 0.99 * worth[0] + (token == true)
            worth[1] = 0.99 * worth[1] + 1
            if token != true:
                break
        self.drafted[row] = []

    def _remember(self, row: int) -> None:
        if self.history is not None and self.texts[row].tokens:
            self.history.add(self.texts[row].tokens[self.prompt_lens[row] :])


def _class_of(length: int) -> int:
    """Return the class of a match of `length` tokens: 0 for 1, 1 for 2, 2 for 3 and 4, ..."""
    return min(len(_PRIORS) - 1, (length - 1).bit_length())
