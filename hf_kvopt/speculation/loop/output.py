"""Output: the committed tokens of every row, and which rows are done.

    row 0   prompt | a b c d e f g         rows grow by different numbers of tokens
    row 1   prompt | p q r                 criteria were shown the columns that all rows have, `num_shown` of them:
                       ^                   the whole batch, one length after the other, as plain decoding shows it

A criterion is therefore evaluated late for a row that is ahead: the row is cut back to the length where it ended.
Without an end-of-text token, plain decoding continues finished rows until all are finished, and so does this.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    GenerationConfig,
    MaxLengthCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from hf_kvopt import compat


class Output:
    """Tokens, lengths and ends of all rows of one generate() call.

    Args:
        input_ids: [batch, prompt length].
        criteria: transformers' own and the caller's.
        config: the generation config of the call.
        streamer: gets tokens as they are committed.
    """

    def __init__(
        self,
        input_ids: Tensor,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        batch, prompt_len = input_ids.shape
        lengths = [criterion.max_length for criterion in criteria if type(criterion) is MaxLengthCriteria]
        # One token is always generated before the length is checked.
        self.max_length = max(prompt_len + 1, min(lengths, default=config.max_length))
        self.eos = {
            int(token) for one in criteria if type(one) is EosTokenCriteria for token in one.eos_token_id.flatten()
        }
        # Criteria on the last token and the length are judged here; others may read anything.
        own = (MaxLengthCriteria, EosTokenCriteria)
        self.others = StoppingCriteriaList([criterion for criterion in criteria if type(criterion) not in own])
        self.rows_end = any(hasattr(criterion, "eos_token_id") for criterion in criteria)  # as transformers tests it
        self.is_met = torch.zeros(batch, dtype=torch.bool, device=input_ids.device)  # by `others`, unless rows end
        self.pad = compat.pad_token(config)
        self.ids = input_ids.new_full((batch, self.max_length), self.pad)
        self.ids[:, :prompt_len] = input_ids
        self.prompt_len, self.lens, self.is_done = prompt_len, [prompt_len] * batch, [False] * batch
        self.lasts = input_ids[:, -1].tolist() if prompt_len else [self.pad] * batch  # last token of each row
        self.num_shown = prompt_len
        self.scores_shown: tuple[Tensor, ...] = ()
        self.streamer = streamer
        self.config = config
        records = config.return_dict_in_generate
        self.scores: list[list[Tensor]] | None = (
            [[] for _ in range(batch)] if records and config.output_scores else None
        )
        self.logits: list[list[Tensor]] | None = (
            [[] for _ in range(batch)] if records and config.output_logits else None
        )

    @property
    def records(self) -> bool:
        """Return whether scores or logits are kept."""
        return self.scores is not None or self.logits is not None

    def begin(self) -> None:
        """Show the prompt to the streamer."""
        if self.streamer is not None:
            self.streamer.put(self.ids[:, : self.prompt_len].cpu())

    @property
    def active(self) -> list[int]:
        """Rows that are not done."""
        return [row for row, done in enumerate(self.is_done) if not done]

    @property
    def remaining(self) -> int:
        """Most tokens that a row may still get."""
        return max((self.max_length - self.lens[row] for row in self.active), default=0)

    @property
    def width(self) -> int:
        """Length of the longest row."""
        return max(self.lens)

    def commit(self, tokens: Sequence[Sequence[int]]) -> list[list[int]]:
        """Append `tokens[row]` to each row that is not done, up to the first that ends it; return those taken."""
        starts, is_new, active = list(self.lens), [not done for done in self.is_done], self.active
        if all(len(tokens[row]) == 1 for row in active):
            self._append_one(active, [tokens[row][0] for row in active])
        else:
            for row in active:
                self._append(row, tokens[row])
        for row in active:
            self._trim(row)
        self._show()
        if self.streamer is not None:
            self.streamer.put(self.ids[0, starts[0] : self.lens[0]].cpu())
        return [
            list(row[: max(0, end - start)]) if new else []
            for row, start, end, new in zip(tokens, starts, self.lens, is_new, strict=True)
        ]

    def record(self, row: int, scores: Tensor, logits: Tensor) -> None:
        """Keep scores and logits [tokens, vocab] of the tokens that a row gets next, if they are asked for."""
        for kept, new in ((self.scores, scores), (self.logits, logits)):
            if kept is not None:
                kept[row].extend(new.clone())

    def result(self, cache: Any) -> Tensor | GenerateDecoderOnlyOutput:
        """Return the result of generate(), with shorter rows padded."""
        if self.streamer is not None:
            self.streamer.end()
        sequences = self.ids[:, : self.width]
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=self._by_step(self.scores),  # type: ignore[arg-type]
            logits=self._by_step(self.logits),  # type: ignore[arg-type]
            **{compat.CACHE_KEYWORD: cache},
        )

    def _append(self, row: int, tokens: Sequence[int]) -> None:
        start = self.lens[row]
        taken = list(tokens[: self.max_length - start])
        end = next((i for i, token in enumerate(taken, start=1) if token in self.eos), None)
        taken = taken[:end]
        self.ids[row, start : start + len(taken)] = torch.tensor(taken, device=self.ids.device)
        self.lens[row] = start + len(taken)
        self.lasts[row] = taken[-1] if taken else self.lasts[row]
        self.is_done[row] = end is not None or self.lens[row] == self.max_length

    def _append_one(self, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Append one token to each of `rows`, in one operation."""
        self.ids[rows, [self.lens[row] for row in rows]] = torch.tensor(tokens, device=self.ids.device)
        for row, token in zip(rows, tokens, strict=True):
            self.lens[row] += 1
            self.lasts[row] = token
            self.is_done[row] = token in self.eos or self.lens[row] == self.max_length

    def _show(self) -> None:
        """Show the other criteria every length that all rows have reached."""
        while self.others and self.num_shown < min((self.lens[row] for row in self.active), default=self.width):
            self.num_shown += 1
            if self.scores is not None:
                self.scores_shown += (self._step(self.scores, self.num_shown - self.prompt_len - 1),)
            scores = None if self.scores is None else self.scores_shown
            says = self.others(self.ids[:, : self.num_shown].clone(), scores)
            self.is_met = says if self.rows_end else self.is_met | says
            if not self.rows_end and not bool(self.is_met.all()):
                continue
            for row, is_met in enumerate(self.is_met.tolist()):
                if is_met and self.lens[row] >= self.num_shown:
                    self._cut(row, self.num_shown)

    def _cut(self, row: int, length: int) -> None:
        """End a row at `length`."""
        self.ids[row, length:] = self.pad
        self.lens[row], self.is_done[row] = length, True
        self._trim(row)

    def _trim(self, row: int) -> None:
        """Drop the scores and logits of tokens that were not taken."""
        for kept in (self.scores, self.logits):
            if kept is not None:
                del kept[row][self.lens[row] - self.prompt_len :]

    def _step(self, rows: list[list[Tensor]], step: int) -> Tensor:
        """Stack one generated position of all rows to [batch, vocab]."""
        return torch.stack([row[step] for row in rows])

    def _by_step(self, rows: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
        if rows is None:
            return None
        return tuple(self._step(rows, step) for step in range(self.width - self.prompt_len))
