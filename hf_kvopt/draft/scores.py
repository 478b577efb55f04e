"""Logits processors along drafted paths: each position is processed with the very prefix that plain decoding has there.

Processors that look at scores alone (temperature, top-k, ...) take all positions at once. The others (repetition
penalty, bad words, minimum length, ...) get every position with its own prefix, those of equal length together.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers.generation import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    SuppressTokensLogitsProcessor,
    SynthIDTextWatermarkLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)

_SCORES_ALONE = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
    TypicalLogitsWarper,
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    SuppressTokensLogitsProcessor,
)
# They keep state from step to step, or run the model themselves: a position that is not kept would count.
_STATEFUL = (SynthIDTextWatermarkLogitsProcessor, UnbatchedClassifierFreeGuidanceLogitsProcessor)
# They know a row by its number in the batch.
_BY_ROW = (
    PrefixConstrainedLogitsProcessor,
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
)


class NodeScores:
    """Applies a `LogitsProcessorList` to the logits of all nodes of a draft.

    Raises:
        ValueError: a processor that cannot be applied along several paths at once; before the first token.
    """

    def __init__(self, processors: LogitsProcessorList, batch_size: int) -> None:
        for processor in processors:
            if isinstance(processor, _STATEFUL):
                raise ValueError(
                    f"{type(processor).__name__} keeps state from one token to the next: got speculation, which looks "
                    "at several at once; generate without custom_generate, or drop the processor"
                )
            if isinstance(processor, _BY_ROW) and batch_size > 1:
                raise ValueError(
                    f"{type(processor).__name__} knows a row by its number: got {batch_size} rows under speculation, "
                    "where finished rows leave; generate one row at a time, or drop the processor"
                )
        self.processors = processors
        self.by_row = any(isinstance(processor, _BY_ROW) for processor in processors)
        self.warpers = LogitsProcessorList([p for p in processors if type(p) in _SCORES_ALONE])
        self.needs_prefix = len(self.warpers) < len(processors)

    def warp(self, logits: Tensor) -> Tensor:
        """What needs no prefix, on logits [batch, vocab]: for a drafter's own distribution."""
        # Warpers are given ids by their signature and do not read them.
        return self.warpers(logits.new_zeros(len(logits), 1, dtype=torch.long), logits)  # type: ignore[arg-type]

    def __call__(self, logits: Tensor, prefixes: Sequence[Sequence[Tensor]] | None) -> Tensor:
        """Scores [batch, nodes, vocab] of logits of that shape; `prefixes[row][node]` [length] is what comes before."""
        if not self.processors:
            return logits
        batch, nodes, vocab = logits.shape
        if not self.needs_prefix:
            return self.warp(logits.reshape(-1, vocab)).view(batch, nodes, vocab)
        assert prefixes is not None
        flat, scores = logits.reshape(-1, vocab), torch.empty_like(logits).view(-1, vocab)
        ids = [prefix for row in prefixes for prefix in row]
        for group in self._groups(ids):
            picked = torch.tensor(group, device=logits.device)
            prefix = torch.stack([ids[i] for i in group])
            scores[picked] = self.processors(prefix, flat[picked])  # type: ignore[arg-type]
        return scores.view(batch, nodes, vocab)

    def _groups(self, ids: Sequence[Tensor]) -> list[list[int]]:
        """Indices of prefixes of one length; one at a time where a processor numbers its rows."""
        if self.by_row:
            return [[i] for i in range(len(ids))]
        groups: dict[int, list[int]] = {}
        for i, prefix in enumerate(ids):
            groups.setdefault(len(prefix), []).append(i)
        return list(groups.values())
