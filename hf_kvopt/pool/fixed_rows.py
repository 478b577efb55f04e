"""Rows of fixed capacity as a compiled graph sees them: where their next tokens go, and the centres of their keys.

    row r    slots r * capacity ... (r + 1) * capacity - 1    `length` tokens each, on the device

Everything here is a tensor that is changed in place. A graph that was traced once serves any length and any cache of
its shape, and what Python knows of the rows may lag behind what compiled steps wrote.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.errors import OutOfBlocks
from hf_kvopt.kernels import devices
from hf_kvopt.kernels.library import define_op
from hf_kvopt.kernels.store import store_plane
from hf_kvopt.pool.centres import num_pads
from hf_kvopt.pool.slots import writable
from hf_kvopt.quant import CENTRE_TOKENS, SCALE_DTYPE, centre_of, format_of, guarded, quantize


def is_on_host(tensor: Tensor) -> bool:
    """Return whether reading a value of this tensor waits for nothing; see `kernels.devices`."""
    return devices.is_on_host(tensor)


def held_tokens(length: Tensor, capacity: int) -> int:
    """Return how many tokens each row holds; waits for the device.

    Raises:
        OutOfBlocks: more were fed than a row holds, in steps that could not wait: those went nowhere.
    """
    held = int(length)
    if 0 < capacity < held:
        raise OutOfBlocks(
            f"{held - capacity} tokens a row were fed beyond the {capacity} that it holds: got steps on a device that "
            "nobody waited for, and whose outputs are wrong from there on; call cache.reset(), and raise max_tokens to "
            "at least batch_size * (prompt tokens + max_new_tokens)"
        )
    return held


def require_room(num_tokens: int, held: int, capacity: int) -> None:
    """Raise OutOfBlocks where `num_tokens` more do not fit behind the `held` tokens of a row."""
    if held + num_tokens > capacity:
        raise OutOfBlocks(
            f"{num_tokens} more tokens a row were asked for: got {held} of {capacity} used; raise max_tokens to at "
            "least batch_size * (prompt tokens + max_new_tokens)"
        )


def next_slots(
    length: Tensor,  # tokens of each row, a number on the device
    first_slots: Tensor,  # [batch, 1] int64
    num_tokens: int,
    capacity: int,
) -> Tensor:
    """Return the slots [batch * num_tokens] of the next tokens of each row.

    On a CPU they are known to fit: whoever calls this outside of a graph has asked `require_room`. Another device is
    not waited for, and gets -1 for a token beyond the capacity.

    Raises:
        OutOfBlocks: they do not fit, where a compiled graph runs on a CPU.
    """
    is_cpu = is_on_host(length)
    if is_cpu and torch.compiler.is_compiling():
        asked: Tensor = torch.ops.hf_kvopt.next_slots(length, first_slots, num_tokens, capacity)
        return asked
    columns = length if num_tokens == 1 else length + torch.arange(num_tokens, device=length.device)
    slots = first_slots + columns
    return (slots if is_cpu else torch.where(columns < capacity, slots, -1)).reshape(-1)


class FixedCentres:
    """Centres of the keys of rows that stay where they are; see `pool.centres.Centres` for what is learned, and when.

    Between calls: a row that is open holds `length` < 16 tokens, and their keys as they came in `early`.

    Args:
        states: keys [batch, num_kv_heads, any, head_dim] as the model makes them: gives shape, dtype and device.
    """

    def __init__(self, states: Tensor) -> None:
        batch, num_heads, _, dim = states.shape
        device = states.device
        self.vectors = torch.zeros(batch, num_heads, dim, device=device)  # float32; zero is no shift
        self.early = torch.zeros(batch, num_heads, CENTRE_TOKENS, dim, dtype=states.dtype, device=device)
        self.is_open = torch.zeros(batch, dtype=torch.bool, device=device)
        self.restart()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.vectors, self.early, self.is_open = map(writable, self.tensors)
        self.may_learn = True

    def restart(self) -> None:
        """Forget the rows: the next token of each is its first."""
        # Whether compiled steps may have learned what Python does not know of.
        self.may_learn = True
        self._shift: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All that holds memory."""
        return self.vectors, self.early, self.is_open

    def of_rows(self) -> Tensor | None:
        """Return [batch, num_kv_heads, head_dim] float32; None where no row has a shift."""
        if self.may_learn:
            self._shift = self.vectors if bool(self.vectors.any()) else None
        return self._shift

    def learn(
        self,
        states: Tensor,  # [batch, num_kv_heads, tokens, head_dim]
        length: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        rotates: bool,
    ) -> Tensor | None:
        """Return `of_rows` for states that come behind `length` tokens: rows that begin now learn it.

        A row that has 16 tokens now, and another shift than the first of them showed, is stored once more from these.
        """
        if self.may_learn and states.shape[2]:
            _learn_centres(states, length, *self.tensors, codes, scale, rotates)
            self.of_rows()
            self.may_learn = int(length) + states.shape[2] < CENTRE_TOKENS
        return self.of_rows()

    def learn_in_graph(
        self,
        states: Tensor,  # [batch, num_kv_heads, tokens, head_dim]
        length: Tensor,
        codes: Tensor,
        scale: Tensor | None,
        rotates: bool,
    ) -> Tensor | None:
        """Do the same in a compiled graph, which runs on while Python knows nothing of it."""
        is_next = states.shape[2] == 1 and not is_on_host(states)
        if is_next and not self.may_learn:
            return self.in_graph()
        op = torch.ops.hf_kvopt.learn_centres_of_next if is_next else torch.ops.hf_kvopt.learn_centres
        op(states, length, *self.tensors, codes, scale, rotates)
        return self.in_graph()

    def in_graph(self) -> Tensor | None:
        """`of_rows` as a compiled graph takes it.

        A CPU's graph takes zeros, and serves rows with and without a shift; whoever reads them looks whether they are
        zero. On a GPU nobody can look, and what need not be taken at every layer and step is left out once it is known.
        """
        return self.vectors if is_on_host(self.vectors) or self.may_learn else self._shift

    def select(self, indices: list[int]) -> None:
        """Let row i be what row `indices[i]` was."""
        for tensor in self.tensors:
            tensor.copy_(tensor[indices])

    def copy_from(self, other: "FixedCentres") -> None:
        """Become equal to `other`, of the same shape."""
        for mine, theirs in zip(self.tensors, other.tensors, strict=True):
            mine.copy_(theirs)
        self.may_learn = True

    def move_slots(self, src: Sequence[int], dst: Sequence[int], capacity: int) -> None:
        """Follow tokens that are copied from slots `src` to `dst` of their rows of `capacity`."""
        moved = [(a // capacity, a % capacity, b % capacity) for a, b in zip(src, dst, strict=True)]
        early = [(row, a, b) for row, a, b in moved if max(a, b) < CENTRE_TOKENS]
        if early:
            rows, old, new = zip(*early, strict=True)
            self.early[rows, :, new] = self.early[rows, :, old]


def learn_rows(
    states: Tensor,  # [batch, num_kv_heads, tokens, head_dim]
    start: int,
    vectors: Tensor,
    early: Tensor,
    is_open: Tensor,
) -> list[tuple[int, Tensor]]:
    """Let rows whose columns from `start` on come now learn their centre; in place.

    Returns:
        (row, keys [num_kv_heads, tokens, head_dim]) of what is to be stored anew, by the row's new centre.
    """
    if start >= CENTRE_TOKENS:
        return []
    pads = [0] * len(states) if start else num_pads(states)
    anew = []
    for row, is_learning in enumerate(is_open.tolist() if start else [True] * len(states)):
        if not is_learning:
            continue
        first = torch.cat([early[row, :, :start], states[row, :, pads[row] :]], dim=1)[:, :CENTRE_TOKENS]
        is_whole = first.shape[1] == CENTRE_TOKENS
        if not start or is_whole:
            centre = centre_of(first[None])[0]
            if start and not torch.equal(centre, vectors[row]):
                anew.append((row, first[:, :start]))
            vectors[row] = centre
        early[row, :, : first.shape[1]] = first
        is_open[row] = not is_whole and not pads[row]
    return anew


def _next_slots(length: Tensor, first_slots: Tensor, num_tokens: int, capacity: int) -> Tensor:
    require_room(num_tokens, int(length), capacity)
    return next_slots(length, first_slots, num_tokens, capacity)


def _learn_centres(
    states: Tensor,
    length: Tensor,
    vectors: Tensor,
    early: Tensor,
    is_open: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    rotates: bool,
) -> None:
    """`learn_rows`, and what is to be stored anew; waits for the device."""
    start, capacity = int(length), codes.shape[0] * codes.shape[1] // len(states)
    require_room(states.shape[2], start, capacity)  # nothing is learned from what will not be stored
    for row, keys in learn_rows(states, start, vectors, early, is_open):
        slots = torch.arange(row * capacity, row * capacity + keys.shape[1], device=codes.device)
        store_plane(guarded(keys[None], rotates, vectors[row : row + 1]), codes, scale, slots)


def _learn_centres_of_next(
    states: Tensor,  # [batch, num_kv_heads, 1, head_dim]
    length: Tensor,
    vectors: Tensor,
    early: Tensor,
    is_open: Tensor,
    codes: Tensor,
    scale: Tensor | None,
    rotates: bool,
) -> None:
    """Learn from one token a row, without waiting for the device: all is computed, and kept where it is due."""
    is_first, is_last = length == 0, length == CENTRE_TOKENS - 1
    columns = torch.arange(CENTRE_TOKENS, device=length.device)
    early.copy_(torch.where((columns == length)[:, None], states, early))
    is_due = (is_open & is_last)[:, None, None]
    vectors.copy_(torch.where(is_first, centre_of(states), torch.where(is_due, centre_of(early), vectors)))
    is_open.copy_(is_first | (is_open & ~is_last))
    encoded = quantize(guarded(early[:, :, :-1], rotates, vectors), format_of(codes.dtype), SCALE_DTYPE)
    for held, new in zip((codes, scale), encoded, strict=True):
        if held is None or new is None:
            continue
        # float8 is written as its bytes.
        as_bytes = torch.uint8 if held.element_size() == 1 else held.dtype
        rows = held.view(as_bytes).view(len(states), -1, *held.shape[2:])[:, : CENTRE_TOKENS - 1]
        due = is_due.view(-1, *[1] * (rows.dim() - 1))
        rows.copy_(torch.where(due, new.view(as_bytes).transpose(1, 2), rows))


_LEARN = (
    "(Tensor states, Tensor length, Tensor(a!) vectors, Tensor(b!) early, Tensor(c!) is_open, Tensor(d!) codes, "
    "Tensor(e!)? scale, bool rotates) -> ()"
)
define_op(
    "next_slots",
    "(Tensor length, Tensor first_slots, SymInt num_tokens, SymInt capacity) -> Tensor",
    _next_slots,
    lambda length, first_slots, num_tokens, capacity: length.new_empty(len(first_slots) * num_tokens),
)
define_op("learn_centres", _LEARN, _learn_centres, lambda *_: None, tags=(torch.Tag.cudagraph_unsafe,))
define_op("learn_centres_of_next", _LEARN, _learn_centres_of_next, lambda *_: None)
