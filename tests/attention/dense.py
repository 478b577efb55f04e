"""Our attention function beside a mask that is spelled out, on the same random states."""

import torch
from torch import Tensor, nn

from hf_kvopt.attention.forward import attention_forward


class Module(nn.Module):
    """As much of an attention module as an attention function looks at."""

    def __init__(self, is_causal: bool | None = True, training: bool = False) -> None:
        super().__init__()
        if is_causal is not None:
            self.is_causal = is_causal
        self.train(training)


def make_states(batch=2, heads=(4, 2), lengths=(3, 9), sizes=(8, 8)) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as a model hands them over: transposed views of [batch, length, heads, head_dim]."""
    draw = torch.Generator().manual_seed(0)
    shapes = (lengths[0], heads[0], sizes[0]), (lengths[1], heads[1], sizes[0]), (lengths[1], heads[1], sizes[1])
    return tuple(torch.randn(batch, *shape, generator=draw).transpose(1, 2) for shape in shapes)


def plain_attention(q, k, v, seen: Tensor, bias: Tensor | float = 0.0) -> Tensor:
    """[batch, q_len, heads, v_dim]; zero where nothing is seen."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5 + bias
    return (torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1).nan_to_num(0.0) @ v).transpose(1, 2)


def attend_like(mask: Tensor, seen: Tensor, **options) -> tuple[Tensor, Tensor]:
    """Ours under `mask`, and plain attention under `seen`; both zero at queries that see nothing."""
    states = make_states(lengths=tuple(seen.shape[2:]))
    out, weights = attention_forward(Module(), *states, mask, **options)
    assert weights is None
    sees = seen.any(-1)[:, 0, :, None, None]
    return out.masked_fill(~sees, 0.0), plain_attention(*states, seen)
