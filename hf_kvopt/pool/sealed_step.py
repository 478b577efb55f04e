"""Ops of one token a row over sealed blocks of fixed capacity: write and seal it, attend to the rows, read them.

    token t of a row    block t // block_size, whose exact place the table has ready; where it fills the block, and that
                        is not the row's first one, the block is sealed

A compiled graph sees one opaque op each. On a device nothing waits for a value: shapes are those of the batch, and a
block number of -1 is not sealed.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from hf_kvopt.errors import CacheStateError
from hf_kvopt.kernels import devices
from hf_kvopt.kernels.attention import attend
from hf_kvopt.kernels.calls import AttentionCall, KVSpec, RowTensors
from hf_kvopt.kernels.library import PATTERN, define_op
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.sealed_kv import Full, SealCall
from hf_kvopt.kernels.sealed_view import SealedView
from hf_kvopt.kernels.store import sealer_for
from hf_kvopt.pool.fixed_rows import require_room
from hf_kvopt.pool.sealed import SealedPlane
from hf_kvopt.quant import get_kv_format
from hf_kvopt.quant.sealed import seal

_NUM_FORMS = 4  # tensors of keys or of values, see `_FORMS`


class StepRows:
    """Rows as a step on the device knows them; see `kernels.sealed_view.SealedRows`.

    On a CPU, where a value costs nothing, the tables end with the longest row.
    """

    base = origin = first_block = version = 0

    def __init__(self, block_table: Tensor, exact_table: Tensor, seq_lens: Tensor, lags: Tensor, size: int) -> None:
        self.block_size = size
        if devices.is_on_host(seq_lens):
            width = max(1, -(-int(seq_lens.max()) // size))
            block_table, exact_table = block_table[:, :width], exact_table[:, :width]
        self.block_table, self.places, self.seq_lens = block_table, exact_table, seq_lens
        self.lags_on = lags.to(torch.int32)

    @cached_property
    def rows(self) -> list[list[int]]:
        """The blocks of each row."""
        return self.block_table.tolist()

    @cached_property
    def lags(self) -> list[int]:
        """Columns before each row's first token."""
        return self.lags_on.tolist()

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.seq_lens.tolist()

    @property
    def clock(self) -> int:
        """Columns held."""
        return self.lengths[0] + self.lags[0]

    @property
    def is_ragged(self) -> bool:
        """Return whether some row begins later than the first column."""
        return any(self.lags)

    def exact_table(self, device: torch.device) -> Tensor:
        """Return [batch, max_blocks] int32 places."""
        return self.places

    def rows_on(self, device: torch.device) -> RowTensors:
        """The rows as attention reads them."""
        return self.block_table, self.seq_lens, self.lags_on

    def tensors_up_to(self, columns: int, device: torch.device) -> RowTensors:
        """The rows as they are."""
        return self.rows_on(device)

    def numbers(self, numbers: Any, device: torch.device) -> Tensor:
        """Return [len(numbers)] int32 on a device."""
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    def read(self, x: Tensor, skip: int, kv_len: int) -> Tensor:
        """Raise CacheStateError: two forms are no one tensor."""
        raise CacheStateError("sealed and exact blocks are not one tensor: got read(); use dense()")


def _plane(forms: Sequence[Any], name: str, is_key: bool) -> SealedPlane:
    """A plane over what `_FORMS` names: codes, token, mean where there is one, exact."""
    codes, token, mean, exact = forms
    sealed = get_kv_format(name).sealed
    assert sealed is not None
    plane = object.__new__(SealedPlane)
    plane.num_heads, plane.dim, plane.dtype, plane.home = exact.shape[2], exact.shape[3], exact.dtype, exact.device
    plane.block_size, plane.codec = exact.shape[1], sealed.k if is_key else sealed.v
    plane._hold([codes, token] if mean is None else [codes, token, mean], exact)
    return plane


def _planes(forms: Sequence[Tensor | None], name: str) -> tuple[SealedPlane, SealedPlane]:
    """Return the planes of keys and values over what `_FORMS` names of each."""
    return _plane(forms[:_NUM_FORMS], name, True), _plane(forms[_NUM_FORMS:], name, False)


def _write_sealed(
    k: Tensor,  # [batch, num_kv_heads, 1, k_dim]
    v: Tensor,
    *rest: Any,  # the forms of keys and values, the rows, and the format, as the op names them
) -> None:
    """Write the token of column `length` of each row."""
    forms, (block_table, exact_table, lags, length, format) = rest[: 2 * _NUM_FORMS], rest[2 * _NUM_FORMS :]
    planes = _planes(forms, format)
    size = planes[0].block_size
    capacity, on_host = block_table.shape[1] * size, devices.is_on_host(length)
    if on_host:
        require_room(1, int(length), capacity)
    tokens = (length - lags).clamp(max=capacity - 1)
    blocks, offsets = (tokens // size)[:, None], tokens % size
    places = exact_table.gather(1, blocks)[:, 0].long()
    is_full = (offsets == size - 1) & (blocks[:, 0] > 0) & (length < capacity)
    index = block_table.gather(1, blocks)[:, 0].long()
    numbers = torch.where(is_full, index, -1)
    slots = torch.where(length < capacity, places * size + offsets, -1)
    if devices.runs_kernel(k):
        batch = torch.arange(len(slots), device=slots.device)
        full = Full(numbers, places, batch, torch.zeros_like(batch))
        call = SealCall(planes[0].both_forms(k), planes[1].both_forms(v), lambda: slots, lambda: full)
        sealer = sealer_for(call)
        if sealer is not None:
            sealer.run(call)
            return
    rows = is_full.nonzero()[:, 0].tolist() if on_host else []
    for plane, states in zip(planes, (k, v), strict=True):
        _write_plane(plane, states, slots)
        if rows:
            plane.seal_places(numbers[rows].tolist(), places[rows].tolist())
        if not on_host:
            _seal_without_kernel(plane, index, places, is_full)


def _write_plane(plane: SealedPlane, states: Tensor, slots: Tensor) -> None:
    """Write states [batch, heads, 1, dim] to their exact slots; those of slot -1 go nowhere."""
    flat = plane.exact.view(-1, plane.num_heads, plane.dim)
    written = slots.clamp(min=0)
    flat[written] = torch.where((slots >= 0)[:, None, None], states[:, :, 0], flat[written])


def _seal_without_kernel(plane: SealedPlane, index: Tensor, places: Tensor, is_full: Tensor) -> None:
    """Seal the blocks that are full without a look at which; the others write back what they hold."""
    codes, token, mean = seal(plane.exact[places].transpose(1, 2), plane.codec)
    made = [codes.transpose(1, 2), token.transpose(1, 2), mean]
    for held, new in zip(plane.stored, made, strict=False):
        assert new is not None
        due = is_full.view(-1, *[1] * (new.dim() - 1))
        held[index] = torch.where(due, new, held[index])


def _attend_sealed(query: Tensor, *rest: Any) -> Tensor:
    """Attend with one query a row to all that it holds; `rest` as the op names it."""
    forms, (exact_table, lags, block_table, seq_lens, format, *pattern) = rest[: 2 * _NUM_FORMS], rest[2 * _NUM_FORMS :]
    planes = _planes(forms, format)
    rows = StepRows(block_table, exact_table, seq_lens, lags, planes[0].block_size)
    scoring = Pattern(*pattern)
    kv_len = block_table.shape[1] * rows.block_size
    if devices.is_on_host(seq_lens):
        kv_len = rows.clock
        if scoring.mask is not None:
            scoring = scoring._replace(mask=scoring.mask[..., :kv_len])
    k, v = (_view(plane, rows, kv_len) for plane in planes)
    return attend(AttentionCall(query, k, v, scoring))


def _view(plane: SealedPlane, rows: StepRows, kv_len: int) -> SealedView:
    spec = KVSpec((len(rows.block_table), plane.num_heads, kv_len, plane.dim), plane.dtype, plane.format.name)
    return SealedView.of(plane, rows, spec, 0, None, None)  # type: ignore[arg-type]


def _read_sealed(
    codes: Tensor,
    token: Tensor,
    mean: Tensor | None,
    exact: Tensor,
    exact_table: Tensor,
    lags: Tensor,
    block_table: Tensor,
    seq_lens: Tensor,
    format: str,
    is_key: bool,
) -> Tensor:
    """Return [batch, num_kv_heads, capacity, dim] as the last token of each row reads it, finite throughout."""
    plane = _plane((codes, token, mean, exact), format, is_key)
    rows = StepRows(block_table, exact_table, seq_lens, lags, exact.shape[1])
    return plane.read(rows, block_table.shape[1] * exact.shape[1]).contiguous()  # type: ignore[arg-type]


# What a plane is made of, and in which order.
_FORMS = "Tensor{0} {1}_codes, Tensor{2} {1}_token, Tensor{3}? {1}_mean, Tensor{4} {1}_exact"
define_op(
    "write_sealed",
    f"(Tensor k, Tensor v, {_FORMS.format('(a!)', 'k', '(b!)', '(c!)', '(d!)')}, "
    f"{_FORMS.format('(e!)', 'v', '(f!)', '(g!)', '(h!)')}, Tensor block_table, Tensor exact_table, Tensor lags, "
    "Tensor length, str format) -> ()",
    _write_sealed,
    lambda *_: None,
)
define_op(
    "attend_sealed",
    f"(Tensor query, {_FORMS.format('', 'k', '', '', '')}, {_FORMS.format('', 'v', '', '', '')}, Tensor exact_table, "
    f"Tensor lags, Tensor block_table, Tensor seq_lens, str format, {PATTERN}) -> Tensor",
    _attend_sealed,
    lambda query, *rest: query.new_empty(query.shape[0], query.shape[2], query.shape[1], rest[7].shape[3]),
)
define_op(
    "read_sealed",
    f"({_FORMS.format('', 'x', '', '', '')}, Tensor exact_table, Tensor lags, Tensor block_table, Tensor seq_lens, "
    "str format, bool is_key) -> Tensor",
    _read_sealed,
    lambda codes, token, mean, exact, table, lags, blocks, *_: exact.new_empty(
        len(blocks), exact.shape[2], blocks.shape[1] * exact.shape[1], exact.shape[3]
    ),
)
