"""Multi-head latent attention without expanding the cache.

MLA models cache a latent c [R] and one rotary key r [Dr] of each token, and expand them to keys and values of every
head: k = [W_uk c, r], v = W_uv c. A decode step can avoid that: q_nope . (W_uk c) = (W_uk^T q_nope) . c. With the query
absorbed, attention runs over the latents as over one shared KV head, and W_uv is applied after the sum:

    softmax(scale * [W_uk^T q_nope, q_rope] . [c, r]) c W_uv^T              (DeepSeek-V2, arXiv:2405.04434, 2.1.2)

`overrides.latents` makes a model pass its latents on unexpanded; any attention but ours gets the expansion.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_kvopt import compat
from hf_kvopt.kernels.cpu.dense import attend
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.pool.handle import KVHandle, view_of
from hf_kvopt.pool.lazy import LazyTensor

# Beyond this many queries a row, expanding once costs less than attending in the larger latent space.
_MAX_ABSORBED_QUERIES = 16


class Heads(NamedTuple):
    """Channels of a head."""

    nope: int  # of a key, without rotation
    rotary: int  # of a key, with rotation
    v_dim: int


class LatentKV(LazyTensor):
    """Keys (`part` 0) or values (1) of all heads, [batch, num_heads, kv_len, head_dim], stored as latents.

    `module` expands them to dense tensors; a compiled graph, which holds only tensors, uses the projection's weight.
    """

    latent: KVHandle
    rope: KVHandle
    weight: Tensor  # [num_heads * (nope + v_dim), R]
    heads: Heads
    part: int
    module: nn.Module | None

    @staticmethod
    def __new__(
        cls: type,
        latent: KVHandle,
        rope: KVHandle,
        weight: Tensor,
        heads: Heads,
        part: int,
        module: nn.Module | None = None,
    ) -> "LatentKV":
        """Make a lazy tensor from the arguments of the class."""
        batch, _, kv_len, _ = latent.shape
        nope, rotary, v_dim = heads
        num_heads, dim = weight.shape[0] // (nope + v_dim), v_dim if part else nope + rotary
        lazy = LatentKV.wrap((batch, num_heads, kv_len, dim), latent.dtype, latent.device)
        lazy.latent, lazy.rope, lazy.weight, lazy.heads, lazy.part = latent, rope, weight, heads, part
        lazy.module = module
        return lazy

    def expand_both(self) -> tuple[Tensor, Tensor]:
        """Return dense keys and values of all heads."""
        latent, rope = self.latent.dense(), self.rope.dense()
        if self.module is not None:
            return expand(self.module, latent, rope)
        nope, _, v_dim = self.heads
        both = F.linear(latent[:, 0], self.weight).unflatten(-1, (-1, nope + v_dim)).transpose(1, 2)
        keys, values = both.split([nope, v_dim], dim=-1)
        return torch.cat([keys, rope.expand(-1, keys.shape[1], -1, -1)], dim=-1), values

    def dense(self) -> Tensor:
        return self.expand_both()[self.part].contiguous()

    def rewrap(self) -> "LatentKV":
        return LatentKV(self.latent, self.rope, self.weight, self.heads, self.part, self.module)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[Heads, int]]:
        return ["latent", "rope", "weight"], (self.heads, self.part)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: tuple[Heads, int], *_: Any) -> "LatentKV":
        return LatentKV(inner["latent"], inner["rope"], inner["weight"], *context)  # type: ignore[arg-type]

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"LatentKV(shape={tuple(self.shape)}, latent={self.latent!r})"


def is_absorbable(query: Tensor, key: Tensor) -> bool:
    """Return whether attention can run over the latents and is faster there."""
    return isinstance(key, LatentKV) and query.shape[2] <= _MAX_ABSORBED_QUERIES and not torch.is_grad_enabled()


def attend_latent(query: Tensor, key: LatentKV, pattern: Pattern) -> Tensor:
    """Attend over latents: query [batch, num_heads, q_len, nope + rope] to [batch, q_len, num_heads, v_head_dim]."""
    w_uk, w_uv = key.weight.unflatten(0, (-1, key.heads.nope + key.heads.v_dim)).split(
        [key.heads.nope, key.heads.v_dim], dim=1
    )
    q_nope, q_rope = query.split([key.heads.nope, key.heads.rotary], dim=-1)
    absorbed = torch.cat([torch.matmul(q_nope, w_uk), q_rope], dim=-1)
    latent = view_of(key.latent).dense()
    keys = torch.cat([latent, view_of(key.rope).dense()], dim=-1)
    out = attend(absorbed, keys, latent, pattern)
    return torch.einsum("bqhr,hdr->bqhd", out, w_uv)


def expand(module: nn.Module, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """Expand latents with the model's own method."""
    keys, values = compat.original(module, compat.EXPAND_KV)(kv_nope, k_rot)
    return keys, values
