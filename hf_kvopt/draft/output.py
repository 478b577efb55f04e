"""Output: the tokens of every row as they are committed, and when a row is done.

Rows grow by different numbers of tokens, so each keeps its own length; stopping criteria see every new token with the
very ids that plain decoding would show them.
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
    """Ids, lengths and ends of all rows of one generate() call.

    Args:
        input_ids: [batch, prompt length].
        criteria: transformers' own and the caller's.
        config: of this call.
        streamer: is given tokens as they are committed.
    """

    def __init__(
        self,
        input_ids: Tensor,
        criteria: StoppingCriteriaList,
        config: GenerationConfig,
        streamer: BaseStreamer | None,
    ) -> None:
        batch, prompt_len = input_ids.shape
        lengths = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
        self.max_length = max(prompt_len, min([*lengths, config.max_length]))
        self.eos = {
            int(token) for one in criteria if isinstance(one, EosTokenCriteria) for token in one.eos_token_id.flatten()
        }
        self.others = [c for c in criteria if not isinstance(c, MaxLengthCriteria | EosTokenCriteria)]
        self.pad = compat.pad_token(config)
        self.ids = input_ids.new_full((batch, self.max_length), self.pad)
        self.ids[:, :prompt_len] = input_ids
        self.prompt_len, self.lens, self.is_done = prompt_len, [prompt_len] * batch, [False] * batch
        self.streamer = streamer
        self.config = config
        records = config.return_dict_in_generate
        self.scores: list[list[Tensor]] | None = (
            [[] for _ in range(batch)] if records and config.output_scores else None
        )
        self.logits: list[list[Tensor]] | None = (
            [[] for _ in range(batch)] if records and config.output_logits else None
        )
        if streamer is not None:
            streamer.put(input_ids.cpu())

    @property
    def active(self) -> list[int]:
        """Rows that are not done."""
        return [row for row, done in enumerate(self.is_done) if not done]

    @property
    def remaining(self) -> int:
        """Tokens that the row with the most room may still get."""
        return max((self.max_length - self.lens[row] for row in self.active), default=0)

    def commit(self, row: int, tokens: Sequence[int], scores: Tensor | None, logits: Tensor | None) -> list[int]:
        """Append `tokens` up to the first that ends the row, with scores [tokens, vocab]; hand back those taken."""
        start = self.lens[row]
        tokens = list(tokens[: self.max_length - start])
        self.ids[row, start : start + len(tokens)] = torch.tensor(tokens, device=self.ids.device)
        for count, token in enumerate(tokens, start=1):
            for kept, new in ((self.scores, scores), (self.logits, logits)):
                if kept is not None and new is not None:
                    kept[row].append(new[count - 1])
            if self._ends(row, token, start + count):
                self.is_done[row] = True
                self.ids[row, start + count : start + len(tokens)] = self.ids.new_tensor(self.pad)
                tokens = tokens[:count]
                break
        self.lens[row] = start + len(tokens)
        if self.streamer is not None:
            self.streamer.put(self.ids[row, start : self.lens[row]].cpu())
        return tokens

    def result(self, cache: Any) -> Tensor | GenerateDecoderOnlyOutput:
        """What generate() returns; rows that ended earlier are padded, and have zeros for scores."""
        if self.streamer is not None:
            self.streamer.end()
        sequences = self.ids[:, : max(self.lens)]
        if not self.config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,  # type: ignore[arg-type]
            scores=_by_step(self.scores),  # type: ignore[arg-type]
            logits=_by_step(self.logits),  # type: ignore[arg-type]
            **{compat.CACHE_KEYWORD: cache},
        )

    def _ends(self, row: int, token: int, length: int) -> bool:
        if token in self.eos or length >= self.max_length:
            return True
        if not self.others:
            return False
        ids = self.ids[row : row + 1, :length]
        scores = None if self.scores is None else tuple(step[None] for step in self.scores[row])
        return any(bool(torch.as_tensor(criterion(ids, scores)).all()) for criterion in self.others)


def _by_step(rows: list[list[Tensor]] | None) -> tuple[Tensor, ...] | None:
    """One [batch, vocab] a generated position."""
    if rows is None:
        return None
    nothing = next(torch.zeros_like(row[0]) for row in rows if row)
    steps = range(max(len(row) for row in rows))
    return tuple(torch.stack([row[step] if step < len(row) else nothing for row in rows]) for step in steps)
