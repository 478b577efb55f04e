"""HeadwiseKV: keys or values of a layer whose heads hold unlike many tokens, as a cache hands them to the model.

heads 0, 2    [ all tokens of the text              ]     a KVHandle of two heads
heads 1, 3    [ sinks ][ recent ]                         a KVHandle of two heads, shorter
"""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.pool.handle import KVHandle
from hf_kvopt.pool.lazy import LazyTensor
from hf_kvopt.pool.reads import StepGuard


class HeadwiseKV(LazyTensor):
    """Keys or values by the shape of the heads that hold most, and one handle for each kind of head.

    No dense tensor stands for it: only attention that knows it may compute.

    Args:
        parts: one handle a kind of head [batch, heads of the kind, columns, head_dim], the longest first.
        heads: for each of them the numbers of its heads in the layer; int64 on the device of the states.
    """

    parts: list[Tensor]
    heads: list[Tensor]

    @staticmethod
    def __new__(cls: type, parts: Sequence[Tensor], heads: Sequence[Tensor]) -> "HeadwiseKV":
        """See the class."""
        batch, _, kv_len, dim = parts[0].shape
        shape = (batch, sum(len(numbers) for numbers in heads), kv_len, dim)
        made: Any = HeadwiseKV.wrap(shape, parts[0].dtype, parts[0].device)
        made.parts, made.heads = list(parts), list(heads)
        return made

    def set_guard(self, guard: StepGuard) -> None:
        """Tell all parts how a reader has the cache take the step back."""
        for part in self.parts:
            if isinstance(part, KVHandle):
                part.guard = guard

    def query_heads(self, group: int) -> list[Tensor]:
        """Return for each part the numbers of its query heads, where `group` of them share a KV head."""
        own = torch.arange(group, device=self.device)
        return [(numbers[:, None] * group + own).flatten() for numbers in self.heads]

    def dense(self) -> Tensor:
        self._refuse("a dense copy")

    def before_fallback(self, op: str) -> None:
        for part in self.parts:
            if isinstance(part, KVHandle) and part.is_fresh:
                part.before_fallback(op)
        self._refuse(op)

    def rewrap(self) -> "HeadwiseKV":
        return HeadwiseKV(self.parts, self.heads)

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"HeadwiseKV(shape={tuple(self.shape)}, columns={[part.shape[2] for part in self.parts]})"

    def _refuse(self, op: str) -> NoReturn:
        raise UnsupportedModel(
            f"keys and values of heads that hold unlike many tokens have no dense form: got {op} on them; take "
            ".parts, or use a cache with another policy"
        )
