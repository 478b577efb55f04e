"""Logits processors along drafted paths: each position is processed with the very prefix that plain decoding has there.

Processors that look at scores alone (temperature, top-k, ...) take all positions at once. The others (repetition
penalty, bad words, minimum length, ...) get every position with its own prefix, those of equal length together.
"""

from collections.abc import Sequence
from typing import Any

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
    RepetitionPenaltyLogitsProcessor,
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
# They keep state from step to step, run the model themselves, or hold one text a row of the batch.
_REFUSED = (
    SynthIDTextWatermarkLogitsProcessor,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
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
            if isinstance(processor, _REFUSED):
                raise ValueError(
                    f"{type(processor).__name__} counts on one token a row and step: got speculation, which looks at "
                    "several at once; generate without custom_generate, or drop the processor"
                )
        self.processors = processors
        self.warpers = LogitsProcessorList([p for p in processors if type(p) in _SCORES_ALONE])
        self.needs_prefix = len(self.warpers) < len(processors)
        # What knows a row by its number in the batch is told it once, as rows come in other groups here.
        rows = [LogitsProcessorList([_of_row(p, row) for p in processors]) for row in range(batch_size)]
        is_alike = all(p is q for p, q in zip(rows[0], processors, strict=True))
        self.by_row = None if is_alike else rows

    def warp(self, logits: Tensor) -> Tensor:
        """What needs no prefix, on logits [batch, vocab]: for a drafter's own distribution."""
        # Warpers are given ids by their signature and do not read them.
        return self.warpers(logits.new_zeros(len(logits), 1, dtype=torch.long), logits)  # type: ignore[arg-type]

    def __call__(self, logits: Tensor, prefixes: Sequence[Sequence[Tensor]] | None, rows: Sequence[int]) -> Tensor:
        """Scores [batch, nodes, vocab] of logits of that shape.

        `prefixes[i][node]` [length] is what comes before; `rows[i]` the number of row i in the whole batch.
        """
        if not self.processors:
            return logits
        batch, nodes, vocab = logits.shape
        if not self.needs_prefix:
            return self.warp(logits.reshape(-1, vocab)).view(batch, nodes, vocab)
        assert prefixes is not None
        flat, scores = logits.reshape(-1, vocab), torch.empty_like(logits).view(-1, vocab)
        groups: dict[tuple[int, int], list[tuple[int, Tensor]]] = {}
        for i, (row, texts) in enumerate(zip(rows, prefixes, strict=True)):
            for node, text in enumerate(texts):
                key = (0 if self.by_row is None else row, len(text))
                groups.setdefault(key, []).append((i * nodes + node, text))
        for (row, _), group in groups.items():
            processors = self.processors if self.by_row is None else self.by_row[row]
            picked = torch.tensor([index for index, _ in group], device=logits.device)
            prefix = torch.stack([text for _, text in group])
            scores[picked] = processors(prefix, flat[picked])  # type: ignore[arg-type]
        return scores.view(batch, nodes, vocab)


def _of_row(processor: Any, row: int) -> Any:
    """`processor` for row `row` alone, where it has something for each row."""
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, text: allowed(row, text), processor._num_beams)
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(processor, RepetitionPenaltyLogitsProcessor) and isinstance(ignored, Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=int(ignored[row]))
    return processor
