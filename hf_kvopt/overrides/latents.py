"""Override of `expand_kv` by which latent attention (MLA) passes cached latents on; see `attention.mla`."""

import torch
from torch import Tensor, nn

from hf_kvopt import compat
from hf_kvopt.attention.mla import Heads, LatentKV, expand
from hf_kvopt.overrides.instance import InstanceOverride
from hf_kvopt.pool.handle import KVHandle
from hf_kvopt.pool.packed import PackedKV


def install(model: nn.Module) -> None:
    """Override `compat.EXPAND_KV` on each MLA module of `model` whose up-projection can be absorbed."""
    for module in model.modules():
        projection = getattr(module, "kv_b_proj", None)
        # A quantized, adapted or sharded projection has no plain weight to absorb.
        is_plain = type(projection) is nn.Linear and projection.bias is None and type(projection.weight) is nn.Parameter
        if hasattr(module, compat.EXPAND_KV) and is_plain:
            module.__dict__[compat.EXPAND_KV] = LatentExpansion(module)


def uninstall(model: nn.Module) -> None:
    """Undo `install`."""
    for module in model.modules():
        module.__dict__.pop(compat.EXPAND_KV, None)


class LatentExpansion(InstanceOverride):
    """Passes cached latents on as `LatentKV`; expands everything else as the model does."""

    def __call__(self, kv_nope: Tensor, k_rot: Tensor) -> tuple[Tensor, Tensor]:
        module = self.module
        if isinstance(kv_nope, PackedKV) and isinstance(k_rot, PackedKV):
            return kv_nope.map(self, k_rot)
        if not isinstance(kv_nope, KVHandle) or not isinstance(k_rot, KVHandle):
            return expand(module, kv_nope, k_rot)
        weight = module.kv_b_proj.weight
        # An offloaded weight is present only while its own forward runs.
        if weight.device != kv_nope.device:
            return expand(module, kv_nope, k_rot)
        heads = Heads(module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim)
        if torch.compiler.is_compiling():
            return LatentKV(kv_nope, k_rot, weight, heads, 0), LatentKV(kv_nope, k_rot, weight, heads, 1)
        return LatentKV(kv_nope, k_rot, weight, heads, 0, module), LatentKV(kv_nope, k_rot, weight, heads, 1, module)
