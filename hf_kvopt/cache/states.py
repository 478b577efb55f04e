"""StateLayer: transformers' convolution and recurrent states, with what they were before each token of a draft.

    tokens     ... root  x_1  x_2  x_3      read one by one by the layer that holds the states
    history        s_0   s_1  s_2           a copy before each of them; s_3 and the last one are computed
    keep [2]   the row goes on from s_2     each row from its own number of tokens

States sum up a text, so tokens cannot be cut off them: going back means having kept what was there before. Layers whose
states are recorded must be called with one token at a time, by whoever reads the draft (`cache.stepwise`).
"""

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import LinearAttentionLayer

from hf_kvopt.errors import CacheStateError


class State(NamedTuple):
    """Copy of one state of a layer: what its convolution and its recurrence hold."""

    conv: Tensor | None  # [batch, channels, kernel]
    recurrent: Tensor | None  # [batch, ...]
    has_previous: bool

    def rows(self, index: Tensor) -> "State":
        """Return the copy of the rows `index`, in that order."""
        return State(_rows(self.conv, index), _rows(self.recurrent, index), self.has_previous)

    @property
    def num_bytes(self) -> int:
        """Bytes of both tensors."""
        return sum(part.nbytes for part in (self.conv, self.recurrent) if part is not None)


RowStates = tuple[tuple[State, ...], ...]
"""All states of one row: of each layer that holds any, in order, and of each state of it. Batch dimensions are 1."""


class StateLayer(LinearAttentionLayer):
    """transformers' convolution and recurrent states, which may be made in inference mode and written outside of it.

    `history` lists for each state what it was before each token since `keep`; None where nothing is recorded.
    """

    history: dict[int, list[State]] | None = None

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        with torch.inference_mode(False):
            super().lazy_initialization(*args, **kwargs)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times."""
        batch = self._batch_size()
        self._take_rows(torch.arange(batch).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices` (integers or a boolean mask), in that order."""
        self._take_rows(torch.arange(self._batch_size())[indices.cpu()])

    def copy_of(self, idx: int) -> State:
        """Return a copy of state `idx` as it is now."""
        conv, recurrent = self.conv_states[idx], self.recurrent_states[idx]
        return State(
            None if conv is None else conv.clone(),
            None if recurrent is None else recurrent.clone(),
            bool(self.has_previous_state[idx]),
        )

    def row_of(self, row: int) -> tuple[State, ...]:
        """Return copies of the states of one row as they are now, batch 1."""
        return tuple(self._row_of(row, idx) for idx in range(self.number_of_states))

    def put(self, idx: int, state: State) -> None:
        """Let state `idx` be a copy of `state`."""
        with torch.inference_mode(False):
            for states, flags, part in (
                (self.conv_states, self.is_conv_states_initialized, state.conv),
                (self.recurrent_states, self.is_recurrent_states_initialized, state.recurrent),
            ):
                held = states[idx]
                if part is not None and held is not None and held.shape == part.shape and held.dtype == part.dtype:
                    held.copy_(part)  # the address may be known to a captured graph
                else:
                    states[idx], flags[idx] = None if part is None else part.clone(), part is not None
            if state.conv is not None:
                self.device, self.dtype = state.conv.device, state.conv.dtype  # type: ignore[assignment]
                self.conv_kernel_size[idx] = self.conv_kernel_size[idx] or state.conv.shape[-1]
        self.has_previous_state[idx] = state.has_previous

    def note(self, idx: int | None) -> None:
        """Keep a copy of state `idx`, or of all, before the next token changes it; where this is recorded."""
        if self.history is not None:
            for each in range(self.number_of_states) if idx is None else (idx,):
                self.history.setdefault(each, []).append(self.copy_of(each))

    def require_recorded(self, num_tokens: int, paths: Sequence[Sequence[int]]) -> None:
        """Raise CacheStateError unless every state can go back along `paths`, of the last `num_tokens` tokens."""
        if any(list(path) != list(range(len(path))) for path in paths):
            raise CacheStateError(
                f"states sum up a text in its order: got {[list(path) for path in paths]} of the last {num_tokens} "
                "tokens; keep the first tokens of a chain"
            )
        for idx in range(self.number_of_states):
            held = len((self.history or {}).get(idx, ()))
            if held < num_tokens and self.has_previous_state[idx]:
                raise CacheStateError(
                    f"states are taken back to copies of them: got {num_tokens} tokens read, and copies before {held} "
                    "of them; the model's layer was not called token by token, so generate without drafts"
                )

    def keep(self, num_tokens: int, lengths: Sequence[int]) -> None:
        """Let row i be what it was behind the first `lengths[i]` of the last `num_tokens` tokens; forget the copies."""
        for idx, states in (self.history or {}).items():
            if any(length < num_tokens for length in lengths):
                before = [*states[len(states) - num_tokens :], self.copy_of(idx)]
                self.put(idx, _picked(before, lengths))
        if self.history is not None:
            self.history = {}

    def rewind(self) -> None:
        """Go back to what was held before the first recorded token, and forget the copies."""
        for idx, states in (self.history or {}).items():
            self.put(idx, states[0])
        if self.history is not None:
            self.history = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "StateLayer":
        twin = self.__class__.__new__(self.__class__)
        memo[id(self)] = twin
        with torch.inference_mode(False):
            twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def _row_of(self, row: int, idx: int) -> State:
        conv, recurrent = self.conv_states[idx], self.recurrent_states[idx]
        # Wider where transformers records what lies behind the window of the convolution.
        width = self.conv_kernel_size[idx] if conv is not None else None
        return State(
            None if conv is None else conv[row : row + 1, ..., -(width or conv.shape[-1]) :].clone(),
            None if recurrent is None else recurrent[row : row + 1].clone(),
            bool(self.has_previous_state[idx]),
        )

    def _batch_size(self) -> int:
        held = [part for states in (self.conv_states, self.recurrent_states) for part in states.values()]
        return next((len(part) for part in held if part is not None), 0)

    def _take_rows(self, index: Tensor) -> None:
        with torch.inference_mode(False):
            for states in (self.conv_states, self.recurrent_states):
                for idx, part in states.items():
                    states[idx] = _rows(part, index)
            for copies in (self.history or {}).values():
                copies[:] = [state.rows(index) for state in copies]


def put_rows(layers: Sequence[StateLayer], rows: Sequence[RowStates | None]) -> None:
    """Let row i of `layers` hold the states `rows[i]`; None is a row before its first token."""
    for place, layer in enumerate(layers):
        for idx in range(layer.number_of_states):
            states = [None if row is None else row[place][idx] for row in rows]
            has_previous = any(state is not None and state.has_previous for state in states)
            layer.put(idx, State(_joined(states, "conv"), _joined(states, "recurrent"), has_previous))


def num_bytes(row: RowStates) -> int:
    """Return the bytes of all states of one row."""
    return sum(state.num_bytes for states in row for state in states)


def _joined(states: Sequence[State | None], name: str) -> Tensor | None:
    """Return one part of the states of all rows, in which those without a token are as good as zeros."""
    parts: list[Tensor | None] = [None if state is None else getattr(state, name) for state in states]
    like = next((part for part in parts if part is not None), None)
    return None if like is None else torch.cat([torch.zeros_like(like) if part is None else part for part in parts])


def _rows(part: Tensor | None, index: Tensor) -> Tensor | None:
    return None if part is None else part.index_select(0, index.to(part.device))


def _picked(before: Sequence[State], lengths: Sequence[int]) -> State:
    """Return the state whose row i is that of `before[lengths[i]]`."""

    def pick(name: str) -> Tensor | None:
        parts = [getattr(state, name) for state in before]
        like = next((part for part in parts if part is not None), None)
        if like is None:
            return None
        # Before its first token a state is as good as zeros.
        chosen = [parts[length] for length in lengths]
        return torch.stack([like.new_zeros(like.shape[1:]) if p is None else p[i] for i, p in enumerate(chosen)])

    return State(pick("conv"), pick("recurrent"), any(before[length].has_previous for length in lengths))
