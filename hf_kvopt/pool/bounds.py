"""KeyBounds: least and greatest value of each channel over the keys of each block, as they are stored.

    low, high    [num_blocks, num_kv_heads, head_dim] float32, kept up with every write; any for free blocks

Keys that are rotated and centred before they are stored have bounds of that form, which a query is turned to as well.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.eviction.policy import EvictionPolicy
from hf_kvopt.quant import dequantize

if TYPE_CHECKING:
    from hf_kvopt.pool.block_table import BlockTable
    from hf_kvopt.pool.plane import Plane


class KeyBounds:
    """Bounds of one layer's keys.

    Args:
        keys: of the layer, without any token.
    """

    def __init__(self, keys: "Plane") -> None:
        self.num_heads, self.dim = keys.num_heads, keys.dim
        self.low, self.high = self._empty(keys.num_blocks, keys.home), self._empty(keys.num_blocks, keys.home)

    @property
    def num_bytes(self) -> int:
        """Bytes held."""
        return 2 * self.low.untyped_storage().nbytes()

    def note(self, keys: "Plane", table: "BlockTable", start: int, stop: int) -> None:
        """Follow a write to the columns `start` to `stop` of the rows of `table`."""
        device = keys.codes.device
        found = table.memo.of(("bounds", device, start, stop), lambda: _written(table, start, stop), torch.int64)
        numbers, filled = found[:, 0], found[:, 1]
        # Not every device indexes float8: its bytes are picked.
        stored = keys.codes.view(torch.uint8) if keys.codes.element_size() == 1 else keys.codes
        scale = None if keys.scale is None else keys.scale[numbers]
        values = dequantize(stored[numbers].view(keys.codes.dtype), scale, keys.format, torch.float32)
        behind = (torch.arange(keys.block_size, device=device) >= filled[:, None])[..., None, None]
        self.low[numbers] = values.masked_fill(behind, torch.inf).amin(dim=1)
        self.high[numbers] = values.masked_fill(behind, -torch.inf).amax(dim=1)

    def resize(self, num_blocks: int, src: list[int], dst: list[int]) -> None:
        """Move to `num_blocks` blocks, block `src[i]` becoming `dst[i]`."""
        before, device = (self.low, self.high), self.low.device
        self.low, self.high = self._empty(num_blocks, device), self._empty(num_blocks, device)
        for old, new in zip(before, (self.low, self.high), strict=True):
            new[dst] = old[src]

    def copy_blocks(self, src: list[int], dst: list[int]) -> None:
        """Let block `dst[i]` have the bounds of `src[i]`."""
        for held in (self.low, self.high):
            held[dst] = held[src]

    def _empty(self, num_blocks: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False):
            return torch.zeros(num_blocks, self.num_heads, self.dim, device=device)


def bounds_for(policy: EvictionPolicy | None, keys: "Plane") -> KeyBounds | None:
    """Return bounds of a layer's keys where the policy of its rows selects blocks by them."""
    return KeyBounds(keys) if policy is not None and policy.selects_blocks else None


def _written(table: "BlockTable", start: int, stop: int) -> list[list[int]]:
    """Return [number, tokens held] of each block behind the columns `start` to `stop`."""
    size, found = table.block_size, []
    for row, lag in zip(table.rows, table.lags, strict=True):
        first, end = max(0, start - table.base - lag), stop - table.base - lag
        found += [[row[i], min(size, end - i * size)] for i in range(first // size, -(-max(0, end) // size))]
    return found


def require_tokens(policy: EvictionPolicy | None) -> None:
    """Raise UnsupportedModel where a policy selects blocks, or moves old tokens, by keys that are sealed."""
    if policy is not None and (policy.selects_blocks or policy.shrinks_chunks):
        does = "selects blocks by" if policy.selects_blocks else "moves tokens of older chunks by"
        raise UnsupportedModel(
            f"{policy} {does} keys that are stored token by token: got a format that seals whole blocks; use paged, "
            "int8 or fp8_e4m3"
        )
