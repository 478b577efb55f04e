"""A model with outlier keys like those of Qwen2.5, made from one without.

A bias of ±40 to 60 on the key channels of the two slowest rotary pairs hardly rotates over thousands of positions: it
shifts all keys of a head by nearly the same vector, which softmax ignores. The model stays as good as it was, while a
scale that must span the bias has no resolution left for the differences between keys.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

from evals._common.cli import BadArgumentError

SMALLEST, LARGEST = 40.0, 60.0


def add_outliers(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Give every `k_proj` the bias, in place, with signs and sizes drawn from `seed`.

    Raises:
        BadArgumentError: the model has no `k_proj` that is a linear layer.
    """
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Channel c rotates together with channel c + head_dim / 2, slower for larger c.
    half = head_dim // 2
    channels = torch.tensor([half - 2, half - 1, head_dim - 2, head_dim - 1])
    generator = torch.Generator().manual_seed(seed)
    projections = [m for name, m in model.named_modules() if name.endswith("k_proj") and isinstance(m, nn.Linear)]
    if not projections:
        raise BadArgumentError(f"--outliers needs a model with linear k_proj layers: {type(model).__name__} has none")
    for projection in projections:
        num_heads = projection.out_features // head_dim
        size = SMALLEST + (LARGEST - SMALLEST) * torch.rand(num_heads, len(channels), generator=generator)
        sign = torch.randint(0, 2, size.shape, generator=generator) * 2 - 1
        bias = torch.zeros(num_heads, head_dim)
        bias[:, channels] = size * sign
        own = projection.bias.detach() if projection.bias is not None else 0.0
        projection.bias = nn.Parameter(bias.flatten().to(projection.weight) + own, requires_grad=False)
    return model
