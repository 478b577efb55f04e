"""Decoder layer of an EAGLE head; the caller supplies the attention.

EAGLE-3, first layer:   x = [norm(e); norm(f)],  residual f       e: embedded next token, f: feature
EAGLE-1, first layer:   x = fc([e; f]),          residual x       (made by the head, not normed)
any further layer:      x = norm(h),             residual h

then, as in Llama, h = residual + attention(x), out = h + mlp(norm(h)). A drafting step is bound by the number of
operations, not by their size: projections are fused, and weights are applied without calling their modules.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hf_kvopt.speculation.heads.config import EagleConfig

# (layer, q [batch, num_heads, q_len, head_dim], k, v [batch, num_kv_heads, q_len, head_dim])
# -> [batch, q_len, num_heads, head_dim]; it keeps k and v for later steps.
Attend = Callable[["EagleLayer", Tensor, Tensor, Tensor], Tensor]


class EagleLayer(nn.Module):
    """One decoder layer; the module docstring gives its inputs."""

    is_causal = True

    def __init__(self, config: EagleConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.is_wide = layer_idx == 0 and config.eagle_version == 3
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.norm_before_residual = config.norm_before_residual
        hidden, inner = config.hidden_size, config.intermediate_size
        num_all = self.num_heads + 2 * self.num_kv_heads
        width = 2 * hidden if self.is_wide else hidden
        self.qkv_proj = nn.Linear(width, num_all * self.head_dim, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=config.attention_bias)
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=config.mlp_bias)
        self.down_proj = nn.Linear(inner, hidden, bias=config.mlp_bias)
        self.act = F.silu if config.hidden_act == "silu" else ACT2FN[config.hidden_act]
        eps = config.rms_norm_eps
        if self.is_wide or layer_idx > 0:
            self.input_layernorm = nn.RMSNorm(hidden, eps)
        if self.is_wide:
            self.hidden_norm = nn.RMSNorm(hidden, eps)
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps)
        self.q_norm = nn.RMSNorm(self.head_dim, eps) if config.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps) if config.qk_norm else None

    def forward(
        self,
        hidden: Tensor,  # [batch, q_len, hidden_size]
        embeds: Tensor,  # [batch, q_len, hidden_size]: embeddings of the token after each position
        rotation: Tensor,  # [batch | 1, q_len, 2, head_dim]: see `RotaryTable`
        attend: Attend,
        last: Tensor | None = None,  # [batch, 1] int64
    ) -> Tensor:
        """Return states [batch, q_len, hidden_size], or [batch, 1, hidden_size] at `last`."""
        x, residual = self._take_in(hidden, embeds)
        batch, q_len, _ = x.shape
        qkv = linear(self.qkv_proj, x).view(batch, q_len, -1, self.head_dim)
        qk, v = qkv.split([self.num_heads + self.num_kv_heads, self.num_kv_heads], dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat([self.q_norm(qk[:, :, : self.num_heads]), self.k_norm(qk[:, :, self.num_heads :])], dim=2)
        qk = rotate(qk, rotation).transpose(1, 2)
        q = qk[:, : self.num_heads]
        if last is not None and q_len > 1:
            q = q.gather(2, last[:, None, :, None].expand(-1, self.num_heads, -1, self.head_dim))
            residual = residual.gather(1, last[:, :, None].expand(-1, -1, residual.shape[2]))
        out = attend(self, q, qk[:, self.num_heads :], v.transpose(1, 2))
        h = residual + linear(self.o_proj, out.flatten(2))
        gate, up = linear(self.gate_up_proj, norm(self.post_attention_layernorm, h)).chunk(2, dim=-1)
        return h + linear(self.down_proj, self.act(gate) * up)

    def _take_in(self, hidden: Tensor, embeds: Tensor) -> tuple[Tensor, Tensor]:
        if self.is_wide:
            normed = norm(self.hidden_norm, hidden)
            x = torch.cat([norm(self.input_layernorm, embeds), normed], dim=-1)
            return x, normed if self.norm_before_residual else hidden
        return (norm(self.input_layernorm, hidden) if self.layer_idx > 0 else hidden), hidden


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """Compute `module(x)` without the overhead of a module call."""
    return F.linear(x, module.weight, module.bias)


def norm(module: nn.RMSNorm, x: Tensor) -> Tensor:
    """Compute `module(x)` without the overhead of a module call."""
    return torch.rms_norm(x, module.normalized_shape, module.weight, module.eps)


class RotaryTable:
    """Table of cosines and sines by position, made once: computing them anew would cost a tenth of a drafting step.

    The signs of "rotate half" are in the sines. Supports any rope type of transformers whose frequencies do not depend
    on the length.
    """

    def __init__(self, config: EagleConfig) -> None:
        # The embedding is made at first use: from_pretrained builds heads without memory first.
        self._config = config
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> Tensor:
        """Return rotations [..., 2, head_dim] for `positions` [...] int64."""
        length = 1
        # Reading the largest position would synchronize a GPU; there the table covers all positions of the model at
        # once.
        if positions.device.type == "cpu" and not torch.compiler.is_compiling():
            length = int(positions.max()) + 1
        return self.reserve(length, positions.device, dtype)[positions]

    def reserve(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Return the table [positions, 2, head_dim], with at least `length` positions."""
        table = self._tables.get((device, dtype))
        if table is None or len(table) < length:
            table = self._tables[device, dtype] = self._make(length, device, dtype)
        return table

    @torch.no_grad()
    def _make(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        length = 1 << (max(length, 4096) - 1).bit_length()
        length = max(length, self._config.max_position_embeddings) if device.type != "cpu" else length
        # Made on `device`: the default device may be another, even one without memory.
        with torch.inference_mode(False), device:
            rotary = LlamaRotaryEmbedding(self._config)  # type: ignore[arg-type]
            positions = torch.arange(length, device=device)[None]
            cos, sin = rotary(torch.empty(0, device=device, dtype=torch.float32), positions)
            half = sin.shape[-1] // 2
            sin = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            return torch.stack([cos[0], sin[0]], dim=1).to(dtype)


def rotate(
    x: Tensor,  # [batch, q_len, heads, head_dim]
    rotation: Tensor,  # [batch | 1, q_len, 2, head_dim]
) -> Tensor:
    """Apply the rotary embedding to `x`, rotating halves against each other."""
    cos, sin = rotation[:, :, :1], rotation[:, :, 1:]
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin)


def causal_rollout(num_positions: int, group: int, device: torch.device) -> Tensor:
    """Return a mask [group * num_positions, num_positions] bool: True where a query must not see a key."""
    mask = torch.ones(num_positions, num_positions, dtype=torch.bool, device=device).triu(1)
    return mask.repeat(group, 1)


class RolloutAttention:
    """Attention of EAGLE-3's training-time test: all positions draft at once, each a chain of its own.

    At step i, position t sees the keys of step 0 up to t, and only its own key of each later step: these stand where
    the tokens t + 1 ... t + i would stand in a cache. Softmax is over both.

    Source: EAGLE-3, arXiv:2503.01840, section 3.2.
    """

    def __init__(self) -> None:
        self._kept: dict[int, list[tuple[Tensor, Tensor]]] = {}
        self._mask: Tensor | None = None

    def __call__(self, layer: EagleLayer, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend to the keys of this and the earlier steps, and keep k and v; see `Attend`."""
        kept = self._kept.setdefault(layer.layer_idx, [])
        kept.append((k, v))
        batch, num_heads, length, dim = q.shape
        group = num_heads // k.shape[1]
        if self._mask is None:
            self._mask = causal_rollout(length, group, q.device)
        folded = (q * layer.scaling).reshape(batch, -1, group * length, dim)
        past = torch.matmul(folded, kept[0][0].transpose(2, 3)).masked_fill(self._mask, float("-inf"))
        spread = folded.view(batch, -1, group, length, dim)
        own = [(spread * k_i[:, :, None]).sum(-1).view(batch, -1, group * length, 1) for k_i, _ in kept[1:]]
        probs = torch.softmax(torch.cat([past, *own], dim=-1), dim=-1, dtype=torch.float32).to(v.dtype)
        out = torch.matmul(probs[..., :length], kept[0][1]).view(batch, -1, group, length, dim)
        for i, (_, v_i) in enumerate(kept[1:]):
            out = out + probs[..., length + i].view(batch, -1, group, length, 1) * v_i[:, :, None]
        return out.reshape(batch, num_heads, length, dim).transpose(1, 2)
