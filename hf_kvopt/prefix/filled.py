"""FilledCache: a paged cache that holds the first part of some prompts, and checks that a call goes on from there.

    columns    0 ........ held | held + 1 ... n      the first forward must bring just the columns that are missing

A token of the prompt that is dropped, or fed twice, and a prompt of another text are refused. Layers with states read
these before any key of the forward is written: what can be checked is checked then.
"""

from collections.abc import Hashable, Iterator, Sequence
from contextlib import contextmanager

import torch

from hf_kvopt import compat
from hf_kvopt.cache.forwards import KEYS
from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.cache.states import RowStates
from hf_kvopt.compat.generation import Call
from hf_kvopt.errors import CacheStateError
from hf_kvopt.prefix.shared_blocks import SharedBlocks


class FilledCache(PagedCache):
    """Base of `PrefixSharedCache`, which fills it and files what it holds."""

    blocks: SharedBlocks
    key: Hashable = None  # what the prompts are filed under, the namespace included
    namespace: Hashable = None
    texts: list[list[int]] | None = None  # the prompt of each row, without padding; None while blank
    pads: Sequence[int] = ()
    prompt_columns = 0
    is_to_check = False  # handed to a caller, who may change the model before it is used
    is_committed = False
    _is_used = _is_begun = False  # a forward has written keys, or is about to read states
    _filled = _chunk = _seen = 0

    def states_of(self, row: int) -> RowStates:
        """Return copies of what the layers with states hold for one row now."""
        return tuple(layer.row_of(row) for layer in self._stock_layers())

    @property
    def is_between_forwards(self) -> bool:
        """Return whether the layers with states have read what the others hold: no forward stopped half way."""
        return self._log is None or self._log.is_whole

    def _forget_prompt(self) -> None:
        self.texts, self.pads, self.key = None, [], None
        self.prompt_columns = self._filled = self._chunk = self._seen = 0
        self.is_to_check = self.is_committed = self._is_used = self._is_begun = False

    def _before_change(self, layer_idx: int, part: str, is_once: bool = True) -> None:
        self._begin_states()
        super()._before_change(layer_idx, part, is_once)

    def _before_write(self, layer_idx: int, part: str, num_tokens: int, batch: int = 0) -> None:
        if part != KEYS:
            self._begin_states()
        super()._before_write(layer_idx, part, num_tokens, batch)

    def _begin_states(self) -> None:
        """Check that states go to the call they were filled for, and give each beam a row, before they are read."""
        if self.is_committed:
            self._require_open()
        if self._is_begun or self.texts is None or not self._filled:
            return
        call = compat.running_call(self)
        if self.is_to_check:
            self.blocks.require_unchanged(self.key, self.namespace)
        repeats = 1 if call is None or call.ids is None else len(call.ids) // len(self.texts)
        if repeats > 1:
            self.batch_repeat_interleave(repeats)
        require_own_prompt(self.texts, self.pads, call)
        self._is_begun = True

    @contextmanager
    def _noted(self, layer_idx: int) -> Iterator[None]:
        """Note where a layer refuses a forward in which layers before it may have changed their states."""
        try:
            yield
        except BaseException:
            if self._log is not None and not self._log.begins(self._place(layer_idx)):
                self._log.note_refusal()
            raise

    def _require_open(self) -> None:
        if self.is_committed:
            raise CacheStateError(
                "this cache was committed to its store, which shares its blocks now: got a further use of it; call "
                "store.cache(input_ids, attention_mask) for the next turn"
            )
        self.blocks.require_alive()

    def _begin_forward(self, batch: int, num_tokens: int) -> None:
        """Check what the first forwards bring, and give each beam or returned sequence a row of its own."""
        assert self.texts is not None
        if self.is_to_check and not self._is_used and self._filled:
            self.blocks.require_unchanged(self.key, self.namespace)
        if not self._is_used and batch != len(self.texts) and batch % len(self.texts) == 0:
            repeats = batch // len(self.texts)
            self.batch_repeat_interleave(repeats)
        if not self._is_used and self._filled:
            require_own_prompt(self.texts, self.pads, compat.running_call(self))
        missing = self.prompt_columns - self._seen
        if not self._filled or missing <= 0 or num_tokens == missing:
            return
        # Chunks of one size, the last of which may be smaller, are a chunked prefill; single tokens are not.
        is_chunk = 1 < num_tokens < missing and num_tokens == (self._chunk or num_tokens)
        if not is_chunk:
            raise CacheStateError(
                f"{num_tokens} tokens a row were fed behind the {self._seen} that are cached of a prompt of "
                f"{self.prompt_columns}: got {'more' if num_tokens > missing else 'less'} than the {missing} that are "
                "missing; pass generate() the whole input_ids and attention_mask that the cache was made for, and no "
                "assistant_model"
            )
        self._chunk = num_tokens


def require_own_prompt(texts: Sequence[list[int]], pads: Sequence[int], call: Call | None) -> None:
    """Raise CacheStateError where the running generate() was given other prompts than a cache was filled for.

    Args:
        texts: the prompts of the cache, without padding.
        pads: how many pads stand before each of them.
        call: the generate() call that the cache was given to; None where there is none.
    """
    if call is None or call.ids is None:
        return
    columns = pads[0] + len(texts[0])
    is_other = (
        call.num_ids == columns
        and len(call.ids) == len(texts)
        and any(row[pad:] != text for row, pad, text in zip(call.ids.tolist(), pads, texts, strict=True))
    )
    mask = None if call.mask is None or call.mask.dim() != 2 else call.mask[:, :columns].bool()
    if mask is not None and len(mask) == len(pads):
        starts = torch.tensor(pads, device=mask.device)[:, None]
        is_other |= not torch.equal(mask, torch.arange(mask.shape[1], device=mask.device) >= starts)
    if is_other:
        raise CacheStateError(
            "this cache was filled for other prompts: got other tokens, or an attention_mask that hides some of "
            "them, by which the keys of all tokens behind would be others; pass generate() the input_ids and the "
            "attention_mask that store.cache(...) was given, or use PagedCache"
        )
