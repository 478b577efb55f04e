"""SealedHandle: the `KVHandle` of a layer whose full blocks are sealed.

A query reads old blocks sealed and new ones exact, and which are old depends on where it stands. No one tensor says
that for several queries. Our attention reads the parts; any other operation gets what the last token of each row reads.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.handle import HandleSpec, KVHandle
from hf_kvopt.pool.tail import exact_table
from hf_kvopt.quant import Quantized

if TYPE_CHECKING:
    from hf_kvopt.pool.block_table import BlockTable
    from hf_kvopt.pool.sealed import SealedPlane


class SealedHandle(KVHandle):
    """Keys or values of one layer, by reference.

    Args:
        plane: the storage.
        table: the rows.
        kv_len: columns handed out.
        skip: see `KVHandle`.
        is_fresh: see `KVHandle`.
        arrived: [batch, num_kv_heads, tokens, head_dim], the states of the last columns, where they are at hand; a long
            step leaves most of them nowhere else.
        states: see `KVHandle`.
    """

    plane: "SealedPlane"  # type: ignore[assignment]
    table: "BlockTable"
    arrived: Tensor | None

    @staticmethod
    def __new__(
        cls: type,
        plane: "SealedPlane",
        table: "BlockTable",
        kv_len: int,
        skip: int,
        is_fresh: bool = False,
        arrived: Tensor | None = None,
        states: Tensor | None = None,
    ) -> "SealedHandle":
        """See the class."""
        shape = (len(table.rows), plane.num_heads, kv_len, plane.dim)
        handle: Any = torch.Tensor._make_wrapper_subclass(
            SealedHandle, shape, dtype=plane.dtype, device=plane.exact.device
        )
        handle.spec = HandleSpec(shape, plane.dtype, plane.format.name)
        handle.codes, handle.scale, handle.centre, handle.place = plane.exact, None, None, None
        handle._block_table = handle._seq_lens = None
        handle.plane, handle.table, handle.skip, handle.version = plane, table, skip, table.version
        handle.is_fresh, handle.arrived, handle.states = is_fresh, arrived, states
        return handle

    def pieces(self) -> None:
        """None: rows are never one tensor of their own."""
        return

    def exact_table(self) -> Tensor:
        """[batch, max_blocks] int32: where the exact ones of each row's blocks lie."""
        return exact_table(self.table, self.plane.exact.device)

    def view_dense(self) -> Tensor:
        """[batch, num_kv_heads, kv_len, head_dim] as a query at the last token of each row reads it."""
        self.check_valid()
        if self.states is not None:
            return self.states
        return self.plane.read(self.table, self.spec.shape[2], self.skip)

    def view_codes(self) -> Quantized:
        """Raise CacheStateError: two forms lie side by side."""
        raise CacheStateError("sealed and exact blocks are not one tensor of codes: got view_codes(); use view_dense()")

    def rewrap(self) -> "SealedHandle":
        return SealedHandle(
            self.plane, self.table, self.spec.shape[2], self.skip, self.is_fresh, self.arrived, self.states
        )
