"""Text that the target writes itself, with its hidden states: training rows of a draft head (self-distillation).

    chat row    <opening of the template> a question, drawn | end, header | an answer, greedy | header | a question ...
    text row    a piece of a text | its greedy continuation

A head drafts for text that its target writes, so that text teaches most. A model with a chat template also invents the
questions (Magpie, arXiv:2406.08464): it is given the template up to where the user speaks. Rows decode side by side
and are all of one length; where a turn ends, the next header is fed, so that no row waits for another. The hidden
states come from the same forwards.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kvopt import compat
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.speculation.training.data import TokenRows
from hf_kvopt.speculation.training.features import Seen, most_likely

_LONGEST_QUESTION, _LONGEST_ANSWER = 64, 256  # tokens
_QUESTION_TEMPERATURE = 0.9
_MARKS = ("\u2402", "\u2403", "\u2404")  # contents that stand for a question, an answer and another question


class Turns(NamedTuple):
    """Tokens that a chat template puts around what is said."""

    opening: list[int]  # before the first question
    to_answer: list[int]  # from the end of a question to the answer
    to_question: list[int]  # from the end of an answer to the next question


def turns_of(tokenizer: PreTrainedTokenizerBase) -> Turns | None:
    """Return the turns of the tokenizer's chat template, or None if it has none that can be cut."""
    if tokenizer.chat_template is None:
        return None
    said = [{"role": role, "content": mark} for role, mark in zip(("user", "assistant", "user"), _MARKS, strict=True)]
    text = str(tokenizer.apply_chat_template(said, tokenize=False))
    if [text.count(mark) for mark in _MARKS] != [1, 1, 1]:
        return None
    parts = [text.partition(mark)[0] for mark in _MARKS]
    opening, to_answer, to_question = parts[0], parts[1][len(parts[0]) + 1 :], parts[2][len(parts[1]) + 1 :]
    parts = [opening, to_answer, to_question]
    return Turns(*tokenizer(parts, add_special_tokens=False)["input_ids"])


def openings(texts: TokenRows, count: int, seed: int) -> list[list[int]]:
    """Return `count` pieces of `texts`, of a sixth to two thirds of a row each, from different documents if possible.

    Raises:
        ValueError: the texts have no document of a sixth of a row.
    """
    least, most, number = max(1, texts.row_len // 6), max(1, 2 * texts.row_len // 3), Random(seed)
    found: list[list[int]] = []
    while len(found) < count:
        texts.set_epoch(number.randrange(2**16))
        before = len(found)
        for document in texts.documents():
            if len(found) == count:
                break
            if len(document) >= least:
                length = number.randint(least, min(most, len(document)))
                start = number.randrange(len(document) - length + 1)
                found.append(document[start : start + length])
        if len(found) == before:
            raise ValueError(f"data must hold a text of at least {least} tokens: got none; give longer texts")
    return found


class Writer:
    """Writes rows with a target.

    Args:
        target: the model, on its device.
        layers: indices of its hidden states to keep.
        row_len: tokens of each row.
        turns: the turns of its chat template; None: it only continues texts.
        ends: ids that end a turn.
    """

    def __init__(
        self, target: PreTrainedModel, layers: Sequence[int], row_len: int, turns: Turns | None, ends: Sequence[int]
    ) -> None:
        self._target, self._layers, self._row_len = target, layers, row_len
        self._turns, self._ends = turns, set(ends)

    @torch.no_grad()
    def write(self, texts: Sequence[Sequence[int]], num_chats: int, seed: int) -> Iterator[tuple[Tensor, Seen] | int]:
        """Write one row for each of `texts`, which begin it, and `num_chats` conversations.

        Yields the number of columns done so far, and at last the rows [rows, row_len] with what was seen.
        """
        rows = [_Row(text, None, self._ends) for text in texts]
        if self._turns is not None:
            rows += [_Row(self._turns.opening, self._turns, self._ends) for _ in range(num_chats)]
        generator = torch.Generator(self._target.device).manual_seed(seed)
        cache = PagedCache(config=self._target.config.get_text_config(decoder=True))
        done, seen = [], []
        width = min(len(row.given) for row in rows)
        feed = torch.tensor([row.begin(width) for row in rows], device=self._target.device)
        try:
            for _ in range(self._row_len):
                out = self._forward(feed, cache)
                top_ids, top_p = most_likely(out.logits)
                features = torch.cat([out.hidden_states[layer] for layer in self._layers], dim=-1)
                done.append(feed)
                seen.append((features.to(torch.bfloat16), top_ids.int(), top_p.half()))
                width = cache.get_seq_length()
                yield int(width)
                if width >= self._row_len:
                    break
                feed = self._next(rows, out.logits[:, -1], top_ids[:, -1, 0], generator)
        finally:
            cache.free()
        whole = [torch.cat(parts, dim=1)[:, : self._row_len] for parts in zip(*seen, strict=True)]
        yield torch.cat(done, dim=1)[:, : self._row_len], Seen(*whole)

    def _forward(self, feed: Tensor, cache: PagedCache) -> Any:
        return self._target(
            input_ids=feed, use_cache=True, output_hidden_states=True, **{compat.cache_keyword(self._target): cache}
        )

    def _next(self, rows: list["_Row"], logits: Tensor, best: Tensor, generator: torch.Generator) -> Tensor:
        """Return the next token of each row [rows, 1]: given, drawn in a question, else the target's first choice."""
        asking = [i for i, row in enumerate(rows) if row.is_asking and not row.given]
        chosen = best.tolist()
        if asking:
            p = torch.softmax(logits[asking].float() / _QUESTION_TEMPERATURE, dim=-1)
            for i, token in zip(asking, torch.multinomial(p, 1, generator=generator)[:, 0].tolist(), strict=True):
                chosen[i] = token
        tokens = [row.take(token) for row, token in zip(rows, chosen, strict=True)]
        return torch.tensor(tokens, device=best.device)[:, None]


class _Row:
    """State of one row: tokens that it is given next, and whose turn it is."""

    def __init__(self, given: Sequence[int], turns: Turns | None, ends: set[int]) -> None:
        self.given, self._turns, self._ends = deque(given), turns, ends
        self.is_asking, self._said = turns is not None, 0

    def begin(self, width: int) -> list[int]:
        """Return the first `width` given tokens."""
        return [self.given.popleft() for _ in range(width)]

    def take(self, chosen: int) -> int:
        """Return the next token: a given one if there is one, else `chosen`, after which the turn may end."""
        if self.given:
            return self.given.popleft()
        self._said += 1
        if self._turns is None:
            return chosen
        header = self._turns.to_answer if self.is_asking else self._turns.to_question
        is_end = chosen in self._ends
        if is_end or self._said >= (_LONGEST_QUESTION if self.is_asking else _LONGEST_ANSWER):
            # The header begins with the end of a turn, where the model did not write that itself.
            self.given.extend(header[1:] if is_end and header[0] in self._ends else header)
            self.is_asking, self._said = not self.is_asking, 0
        return chosen
