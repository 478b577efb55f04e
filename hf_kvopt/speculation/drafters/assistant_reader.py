"""AssistantReader: an assistant and a cache of its own, whose rows read unlike many tokens.

attention alone       row 0   a b c d     one forward; what pads the shorter rows is taken back behind it
                      row 1   p q - -
states beside keys    a b | c d           the tokens that all rows have, as a whole and without copies of states;
                      p   | q -           the rest token by token, in parts, so that each row goes back to its own
"""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt.cache import recording
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.stepwise import stepwise
from hf_kvopt.speculation.loop.reader import Reader

# Tokens for each of which the states of all rows are copied at once.
_PART = 16


def empty_cache(model: PreTrainedModel) -> PagedCache:
    """Return a cache for an assistant, which holds nothing yet."""
    return PagedCache(config=model.config.get_text_config(decoder=True))


class AssistantReader(Reader):
    """Reader over an empty cache from which drafted tokens can be taken back, until `close`."""

    def __init__(self, model: PreTrainedModel, batch_size: int) -> None:
        cache = empty_cache(model)
        super().__init__(model, cache, [0] * batch_size, None, [0] * batch_size, torch.device("cpu"))
        self.num_tried = 0  # tokens read since rows last said what they keep
        self._open = ExitStack()
        recording.begin(cache)
        if cache.records_states:
            self._open.enter_context(stepwise(model))

    def close(self) -> None:
        """Give the memory of the cache back."""
        self._open.close()
        self.cache.free()

    def read(
        self,
        rows: Sequence[Sequence[int]],  # one token a row at least
    ) -> Tensor:
        """Read the tokens of each row behind what it holds, and return the logits [batch, vocab] after its last one."""
        start, width = 0, max(map(len, rows))
        if self.cache.records_states and not any(self.read_lens):
            start = self._read_whole(rows)
        step = _PART if self.cache.records_states else width
        last: list[Tensor] = [torch.empty(0)] * len(rows)
        for begin in range(start, width, step):
            part = [list(row[begin : begin + step]) for row in rows]
            logits = self._read_part(part)
            for i, (row, new) in enumerate(zip(rows, part, strict=True)):
                if new and len(row) <= begin + step:
                    last[i] = logits[i, len(new) - 1]
        return torch.stack(last)

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        outputs = super().forward(tokens, *args, **kwargs)
        self.num_tried += tokens.shape[1]
        return outputs

    def keep(self, q_len: int, paths: Sequence[Sequence[int]]) -> None:
        super().keep(q_len, paths)
        self.num_tried = 0

    def can_drop(self, counts: Sequence[int]) -> bool:
        """Return whether the last `counts[i]` tokens of row i can be taken back: states only as far as copies reach."""
        most = max(counts)
        return most <= min(self.read_lens) and (most <= self.num_tried or not self.cache.records_states)

    def _read_part(self, part: Sequence[list[int]]) -> Tensor:
        width = max(map(len, part))
        logits: Tensor = self.forward(torch.tensor([row + [0] * (width - len(row)) for row in part])).logits
        self.keep(width, [list(range(len(row))) for row in part])
        return logits

    def _read_whole(self, rows: Sequence[Sequence[int]]) -> int:
        """Read the first tokens that all rows have, none of which will be taken back; return how many."""
        count = min(map(len, rows)) - 1
        if count:
            with recording.paused(self.cache):
                self.forward(torch.tensor([list(row[:count]) for row in rows]))
            self.read_lens, self.num_tried = [count] * len(rows), 0
        return count
