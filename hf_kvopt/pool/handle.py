"""KVHandle: what a cache hands to a model instead of keys or values; the whole contract between cache and attention.

It looks like `[batch, num_kv_heads, kv_len, head_dim]`. Our attention takes `codes`, `scale` and the block table out
of it and reads the blocks in place; every other operation gets a gathered, dequantized copy. A handle is valid until
the next `update` or other change of its cache; a later use raises.
"""

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.kernels.cpu.paged_attention import Place, place_of
from hf_kvopt.pool.lazy import LazyTensor
from hf_kvopt.pool.slots import RowTensors
from hf_kvopt.quant import Format, Quantized, dequantize, format_of, get_format, rotate, unguarded

if TYPE_CHECKING:
    from hf_kvopt.pool.block_table import BlockTable
    from hf_kvopt.pool.storage import Plane

# The tensors of a handle in a compiled graph.
_PARTS = ("codes", "scale", "_block_table", "_seq_lens", "centre")
logger = logging.getLogger(__name__)

# Stretches of memory of one row that are read one by one; more are gathered.
_MOST_PIECES = 8


class HandleSpec(NamedTuple):
    """Everything about a handle that is no tensor; hashable, so that it can be guarded on under torch.compile."""

    shape: tuple[int, int, int, int]  # batch, num_kv_heads, kv_len, head_dim
    dtype: torch.dtype
    format: str
    rotates: bool = False  # before it was quantized: a query must be, too


class KVHandle(LazyTensor):
    """Keys or values of one layer, by reference.

    Args:
        codes: [num_blocks, block_size, num_kv_heads, width] storage of the pool.
        scale: [num_blocks, block_size, num_kv_heads], or None for unquantized storage.
        block_table: [batch, max_blocks] int32, or None where `table` makes it on demand.
        seq_lens: [batch] int32, or None likewise.
        spec: shape, dtype and storage format.
        plane: the storage itself, for the dense view (eager mode).
        table: the rows, for the dense view (eager mode).
        skip: tokens held that lie before the first one handed out (they are behind a window).
        states: the very tensor that this handle stands for, where it is still at hand (a first prefill), or where the
            table never held all of it (a step longer than the window; `skip` is then negative). Beside quantized
            storage only where it is read instead.
        centre: [batch, num_kv_heads, head_dim] that was taken from each row's keys; a plain softmax needs it not.
        place: where codes and scale lie, for the compiled kernel of a CPU.
    """

    codes: Tensor
    scale: Tensor | None
    spec: HandleSpec
    plane: "Plane | None"
    table: "BlockTable | None"
    skip: int
    states: Tensor | None
    centre: Tensor | None
    place: Place | None
    version: int
    is_fresh: bool
    _block_table: Tensor | None
    _seq_lens: Tensor | None

    @staticmethod
    def __new__(
        cls: type,
        codes: Tensor,
        scale: Tensor | None,
        block_table: Tensor | None,
        seq_lens: Tensor | None,
        spec: HandleSpec,
        plane: "Plane | None" = None,
        table: "BlockTable | None" = None,
        skip: int = 0,
        is_fresh: bool = False,
        states: Tensor | None = None,
        centre: Tensor | None = None,
        place: Place | None = None,
    ) -> "KVHandle":
        """See the class."""
        handle: Any = torch.Tensor._make_wrapper_subclass(KVHandle, spec.shape, dtype=spec.dtype, device=codes.device)
        handle.codes, handle.scale, handle.spec = codes, scale, spec
        handle._block_table, handle._seq_lens = block_table, seq_lens
        handle.plane, handle.table, handle.skip = plane, table, skip
        handle.version = table.version if table is not None else 0
        # Set by `update`, cleared by the attention that follows it: the one that owns this layer of the cache.
        handle.is_fresh = is_fresh
        handle.states, handle.centre, handle.place = states, centre, place
        return handle

    def check_valid(self) -> None:
        """Raise CacheStateError where the cache has moved on since this handle was made."""
        if self.table is not None and self.version != self.table.version:
            raise CacheStateError(
                "this KV handle is out of date: its cache was updated, cropped or reordered after it was made; "
                "take cache.layers[i].keys / .values again, or clone() them before the next step; where the model's "
                "own code does this, use transformers' cache, e.g. enable(model, cache=None)"
            )

    @property
    def is_all_new(self) -> bool:
        """Whether all that is held came with the last update, and no fork holds anything of before."""
        return self.table is not None and not self.table.step_start and len(self.table.allocator.holders) == 1

    @property
    def format(self) -> Format:
        """How the codes are to be read."""
        return get_format(self.spec.format)

    def rows(self) -> RowTensors:
        """Block table, lengths and lags: how attention finds the tokens of each row."""
        table = self.table
        if table is None:
            assert self._block_table is not None
            assert self._seq_lens is not None
            return self._block_table, self._seq_lens, None
        rows = table.rows_on(self.codes.device)
        # A layer may hold fewer columns than its table (it was not part of every forward).
        late = table.clock - table.base - self.skip - self.spec.shape[2]
        return (rows[0], (rows[1] - late).clamp(min=0), rows[2]) if late else rows

    @property
    def lags(self) -> Tensor | None:
        """[batch] int32: leading columns of each row that hold no token; None where no row has any."""
        return self.rows()[2]

    @property
    def starts(self) -> list[int] | None:
        """First column of each row, among those handed out, that holds a token; None where it is the first one."""
        return None if self.table is None else self.table.starts(self.skip, self.spec.shape[2])

    def pieces(self) -> list[list[Tensor]] | None:
        """Views [num_kv_heads, tokens, head_dim] that make up each row; None where rows are better read as one tensor.

        For rows that share a beginning and go on elsewhere: gathering them at each step would copy the whole cache.
        """
        table = self.table
        is_whole = table is not None and not self.skip and table.clock - table.base == self.spec.shape[2]
        if table is None or not is_whole or self.scale is not None or self.codes.device.type != "cpu":
            return None
        runs = table.layout.runs if table.layout.pitch is None else []
        if not runs or not all(0 < len(row) <= _MOST_PIECES for row in runs):
            return None
        heads_first = self.codes.permute(2, 0, 1, 3).flatten(1, 2)
        pieces = []
        for row, length in zip(runs, table.lengths, strict=True):
            *before, last = [heads_first[:, first : first + count] for first, count in row]
            held = length - table.base - sum(piece.shape[1] for piece in before)
            pieces.append([*before, last[:, :held]])
        return pieces

    def view_dense(self) -> Tensor:
        """[batch, num_kv_heads, kv_len, head_dim]: a view of the pool where rows lie evenly in it, else a copy."""
        self.check_valid()
        # A window has let go of the first of these tokens already, or they are wanted as they came.
        if self.states is not None and (self.skip < 0 or self.scale is not None):
            return self.states
        if self.centre is None and not self.spec.rotates:
            return dequantize(*self.view_codes(), self.format, self.spec.dtype)
        return unguarded(dequantize(*self.view_codes(), self.format), self.spec.rotates, self.centre).to(
            self.spec.dtype
        )

    def for_codes(self, query: Tensor) -> Tensor:
        """A query [..., head_dim] as it is to be multiplied with the codes of keys."""
        return rotate(query) if self.spec.rotates else query

    def view_codes(self) -> Quantized:
        """Codes [batch, num_kv_heads, kv_len, width] and scales [batch, num_kv_heads, kv_len] where there are any."""
        self.check_valid()
        if self.plane is not None and self.table is not None:
            return self.plane.read_codes(self.table, self.spec.shape[2], self.skip)
        # Fixed capacity: row r owns the r-th equal share of the pool, so that lengths may change under a CUDA graph.
        batch, _, kv_len, _ = self.spec.shape
        scale = None if self.scale is None else row_views(self.scale, batch)[:, :, :kv_len]
        return Quantized(row_views(self.codes, batch)[:, :, :kv_len], scale)

    def dense(self) -> Tensor:
        return self.view_dense().contiguous()

    def before_fallback(self, op: str) -> None:
        if self.is_fresh and self.table is not None and self.table.policy is not None:
            self.table.refuse()
            raise UnsupportedModel(
                f"keys and values of a cache with {self.table.policy} have gaps that only hf_kvopt's attention knows: "
                f"got {op} on them; load the model with attn_implementation='hf_kvopt', or use a cache without a policy"
            )
        if self.plane is not None:
            self.plane.num_fallbacks += 1
        _say_once(op)

    def rewrap(self) -> "KVHandle":
        return KVHandle(
            self.codes,
            self.scale,
            self._block_table,
            self._seq_lens,
            self.spec,
            self.plane,
            self.table,
            self.skip,
            self.is_fresh,
            self.states,
            self.centre,
            self.place,
        )

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"KVHandle(shape={self.spec.shape}, dtype={self.spec.dtype}, format={self.spec.format!r})"

    def __tensor_flatten__(self) -> tuple[list[str], HandleSpec]:
        if self.table is not None:
            raise CacheStateError(
                "a growing cache cannot enter a compiled graph: got its handle under torch.compile; use "
                "PagedCache(max_tokens=..., compileable=True)"
            )
        return [n for n in _PARTS if getattr(self, n) is not None], self.spec

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], spec: HandleSpec, *_: Any) -> "KVHandle":
        *parts, centre = (inner.get(n) for n in _PARTS)
        return KVHandle(*parts, spec, centre=centre)  # type: ignore[arg-type, call-arg, misc]


def handle_on(
    codes: Tensor,
    scale: Tensor | None,
    block_table: Tensor,
    seq_lens: Tensor,
    kv_len: int,
    dtype: torch.dtype,
    rotates: bool = False,
    centre: Tensor | None = None,
) -> KVHandle:
    """Make a handle on rows of fixed capacity out of what it holds, `dtype` being what a model sees."""
    fmt = format_of(codes.dtype)
    shape = (len(block_table), codes.shape[2], kv_len, codes.shape[3] * fmt.codes_per_byte)
    spec = HandleSpec(shape, dtype, fmt.name, rotates)
    return KVHandle(codes, scale, block_table, seq_lens, spec, centre=centre, place=place_of(codes, scale))


def row_views(x: Tensor, batch: int) -> Tensor:
    """[batch, num_kv_heads, row capacity, ...] view of x [num_blocks, block_size, num_kv_heads, ...], rows in order."""
    return x.view(batch, -1, *x.shape[2:]).transpose(1, 2)


@cache
def _say_once(op: str) -> None:
    logger.warning("%s is not read in place: keys or values were gathered from the paged cache into a copy for it", op)
