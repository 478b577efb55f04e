"""Logits processors along drafted paths: each position is processed with the prefix that plain decoding has there.

Processors that read only scores (temperature, top-k, ...) take all positions at once. Those that read the prefix
(repetition penalty, bad words, minimum length, ...) get every position with its own prefix, those of equal length
together. All others, such as the caller's own, may count their calls, keep state or compare rows: they are called as
plain decoding calls them, on whole batches in the order of the text (`lockstep`).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    ExponentialDecayLengthPenalty,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    InfNanRemoveLogitsProcessor,
    LogitNormalization,
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensAtBeginLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
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
_BY_PREFIX = (
    RepetitionPenaltyLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    NoBadWordsLogitsProcessor,
    MinLengthLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    ForcedBOSTokenLogitsProcessor,
    ForcedEOSTokenLogitsProcessor,
    ExponentialDecayLengthPenalty,
    SuppressTokensAtBeginLogitsProcessor,
)


class NodeScores:
    """Applies a `LogitsProcessorList` to the logits of all nodes of a draft."""

    def __init__(self, processors: LogitsProcessorList, batch_size: int) -> None:
        self.processors = processors
        self.warpers = LogitsProcessorList([p for p in processors if type(p) in _SCORES_ALONE])
        self.needs_prefix = len(self.warpers) < len(processors)
        # By exact type: a derived class may do anything.
        self.needs_lockstep = any(type(p) not in (*_SCORES_ALONE, *_BY_PREFIX) for p in processors)
        # Processors with state for each row are split by row, as rows are grouped differently here.
        rows = [LogitsProcessorList([_of_row(p, row) for p in processors]) for row in range(batch_size)]
        is_alike = all(p is q for p, q in zip(rows[0], processors, strict=True))
        self.by_row = None if is_alike else rows

    def warp(self, logits: Tensor) -> Tensor:
        """Apply the processors that need no prefix to logits [batch, vocab], for a drafter's own distribution."""
        # Warpers take ids by their signature and do not read them.
        return self.warpers(logits.new_zeros(len(logits), 1, dtype=torch.long), logits)  # type: ignore[arg-type]

    def lockstep(self, ids: Tensor, logits: Tensor) -> Tensor:
        """Return scores [batch, vocab] of the logits after `ids` [batch, length], by one call as in plain decoding."""
        return self.processors(ids.clone(), logits)  # type: ignore[arg-type]

    def __call__(self, logits: Tensor, prefixes: Sequence[Sequence[Tensor]] | None, rows: Sequence[int]) -> Tensor:
        """Return scores [batch, nodes, vocab] for logits of that shape.

        `prefixes[i][node]` [length] is the text before it; `rows[i]` is the number of row i in the whole batch.
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


class DraftSampler:
    """Turns a drafter's logits into tokens with the target's sampling settings, so that q is close to p."""

    def __init__(self, scores: NodeScores, do_sample: bool) -> None:
        self.scores, self.is_greedy = scores, not do_sample

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.is_greedy:
            return logits.argmax(dim=-1), None
        q = torch.softmax(self.scores.warp(logits.float()), dim=-1)
        return torch.multinomial(q, 1)[:, 0], q


def _of_row(processor: Any, row: int) -> Any:
    """Return a `processor` for row `row` alone if it holds a value for each row, else the processor itself."""
    ignored = getattr(processor, "prompt_ignore_length", None)
    if type(processor) is RepetitionPenaltyLogitsProcessor and isinstance(ignored, Tensor):
        return RepetitionPenaltyLogitsProcessor(processor.penalty, prompt_ignore_length=int(ignored[row]))
    return processor
