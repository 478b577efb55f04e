"""Multi-head latent attention without expanding the cache.

MLA models cache a latent c [R] and one rotary key r [Dr] a token, and expand them to keys and values of every head:
k = [W_uk c, r], v = W_uv c. A decode step need not: with the query absorbed, q_nope . (W_uk c) = (W_uk^T q_nope) . c,
attention runs over the latents themselves, as over one shared KV head, and W_uv comes after the sum:

    softmax(scale * [W_uk^T q_nope, q_rope] . [c, r]) c W_uv^T              (DeepSeek-V2, arXiv:2405.04434, 2.1.2)

`install` lets a model's `expand_kv` hand on what it was given; whoever is not our attention gets the expansion.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_kvopt import compat
from hf_kvopt.kernels.cpu.dense import attend
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.overrides.instance import InstanceOverride
from hf_kvopt.pool.handle import KVHandle
from hf_kvopt.pool.lazy import LazyTensor
from hf_kvopt.pool.packed import PackedKV

# Beyond this many queries a row, expanding once costs less than attending in the larger latent space.
_MAX_ABSORBED_QUERIES = 16


class _Heads(NamedTuple):
    """Channels of a head."""

    nope: int  # of a key, without rotation
    rotary: int  # of a key, with rotation
    v_dim: int


class LatentKV(LazyTensor):
    """Keys (`part` 0) or values (1) of all heads, [batch, num_heads, kv_len, head_dim], as latents.

    `module` makes the dense tensors; a compiled graph, which holds tensors alone, has the weight of its up-projection.
    """

    latent: KVHandle
    rope: KVHandle
    weight: Tensor  # [num_heads * (nope + v_dim), R]
    heads: _Heads
    part: int
    module: nn.Module | None

    @staticmethod
    def __new__(
        cls: type,
        latent: KVHandle,
        rope: KVHandle,
        weight: Tensor,
        heads: _Heads,
        part: int,
        module: nn.Module | None = None,
    ) -> "LatentKV":
        """See the class."""
        batch, _, kv_len, _ = latent.shape
        nope, rotary, v_dim = heads
        num_heads, dim = weight.shape[0] // (nope + v_dim), v_dim if part else nope + rotary
        lazy = LatentKV.wrap((batch, num_heads, kv_len, dim), latent.dtype, latent.device)
        lazy.latent, lazy.rope, lazy.weight, lazy.heads, lazy.part = latent, rope, weight, heads, part
        lazy.module = module
        return lazy

    def expand_both(self) -> tuple[Tensor, Tensor]:
        """Keys and values of all heads, dense."""
        latent, rope = self.latent.dense(), self.rope.dense()
        if self.module is not None:
            return _expand(self.module, latent, rope)
        nope, _, v_dim = self.heads
        both = F.linear(latent[:, 0], self.weight).unflatten(-1, (-1, nope + v_dim)).transpose(1, 2)
        keys, values = both.split([nope, v_dim], dim=-1)
        return torch.cat([keys, rope.expand(-1, keys.shape[1], -1, -1)], dim=-1), values

    def dense(self) -> Tensor:
        return self.expand_both()[self.part].contiguous()

    def rewrap(self) -> "LatentKV":
        return LatentKV(self.latent, self.rope, self.weight, self.heads, self.part, self.module)

    def __tensor_flatten__(self) -> tuple[list[str], tuple[_Heads, int]]:
        return ["latent", "rope", "weight"], (self.heads, self.part)

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], context: tuple[_Heads, int], *_: Any) -> "LatentKV":
        return LatentKV(inner["latent"], inner["rope"], inner["weight"], *context)  # type: ignore[arg-type]

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return f"LatentKV(shape={tuple(self.shape)}, latent={self.latent!r})"


def install(model: nn.Module) -> None:
    """Override `expand_kv` on each MLA module of `model` whose up-projection can be absorbed."""
    for module in model.modules():
        projection = getattr(module, "kv_b_proj", None)
        # A quantized, adapted or sharded projection has no plain weight to absorb.
        is_plain = type(projection) is nn.Linear and projection.bias is None and type(projection.weight) is nn.Parameter
        if hasattr(module, compat.EXPAND_KV) and is_plain:
            module.__dict__[compat.EXPAND_KV] = _Expander(module)


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        module.__dict__.pop(compat.EXPAND_KV, None)


def is_absorbable(query: Tensor, key: Tensor) -> bool:
    """Whether attention can run over the latents and should."""
    return isinstance(key, LatentKV) and query.shape[2] <= _MAX_ABSORBED_QUERIES and not torch.is_grad_enabled()


def attend_latent(query: Tensor, key: LatentKV, pattern: Pattern) -> Tensor:
    """[batch, q_len, num_heads, v_head_dim] of query [batch, num_heads, q_len, nope + rope] over the latents."""
    w_uk, w_uv = key.weight.unflatten(0, (-1, key.heads.nope + key.heads.v_dim)).split(
        [key.heads.nope, key.heads.v_dim], dim=1
    )
    q_nope, q_rope = query.split([key.heads.nope, key.heads.rotary], dim=-1)
    absorbed = torch.cat([torch.matmul(q_nope, w_uk), q_rope], dim=-1)
    latent = key.latent.view_dense()
    keys = torch.cat([latent, key.rope.view_dense()], dim=-1)
    out = attend(absorbed, keys, latent, pattern)
    return torch.einsum("bqhr,hdr->bqhd", out, w_uv)


class _Expander(InstanceOverride):
    """`expand_kv` that hands cached latents on as they are."""

    def __call__(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        module = self.module
        if isinstance(kv_nope, PackedKV) and isinstance(k_rot, PackedKV):
            return kv_nope.map(self, k_rot)
        if not isinstance(kv_nope, KVHandle) or not isinstance(k_rot, KVHandle):
            return _expand(module, kv_nope, k_rot)
        weight = module.kv_b_proj.weight
        # An offloaded weight is here only while its own forward runs.
        if weight.device != kv_nope.device:
            return _expand(module, kv_nope, k_rot)
        heads = _Heads(module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim)
        if torch.compiler.is_compiling():
            return LatentKV(kv_nope, k_rot, weight, heads, 0), LatentKV(kv_nope, k_rot, weight, heads, 1)
        return LatentKV(kv_nope, k_rot, weight, heads, 0, module), LatentKV(kv_nope, k_rot, weight, heads, 1, module)


def _expand(module: nn.Module, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
    """The model's own expansion."""
    keys, values = compat.original(module, compat.EXPAND_KV)(kv_nope, k_rot)
    return keys, values
