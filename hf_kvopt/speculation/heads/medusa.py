"""Medusa: K heads on the target's last hidden state; head k guesses the k-th token after the next one.

    block(x) = x + silu(W x + b)        logits_k = lm_head_k(block(...block(h)))

One pass makes a whole draft, so a draft is nearly free, but no token of it depends on the one before.

Source: Medusa, arXiv:2401.10774.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hf_kvopt.speculation.heads.base import HeadBase
from hf_kvopt.speculation.heads.config import MedusaConfig
from hf_kvopt.speculation.heads.medusa_session import MedusaSession


class MedusaHead(HeadBase):
    """Medusa heads with the target frozen (Medusa-1); see `MedusaConfig`.

    The weights of all heads are stacked: two matrix products make all logits of a position.
    """

    config_class = MedusaConfig
    config: MedusaConfig
    feature_layers = (-1,)

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(config)
        self.max_gamma = config.medusa_num_heads
        heads, layers, hidden = config.medusa_num_heads, config.medusa_num_layers, config.hidden_size
        self.block_weight = nn.Parameter(torch.zeros(layers, heads, hidden, hidden))
        self.block_bias = nn.Parameter(torch.zeros(layers, heads, 1, hidden))
        self.lm_weight = None
        if not config.shared_lm_head:
            self.lm_weight = nn.Parameter(torch.empty(heads, config.draft_vocab_size, hidden))
        self._make_vocab_buffers()
        self.post_init()

    def bind(self, target: PreTrainedModel) -> None:
        super().bind(target)
        if self.lm_weight is None and target.get_output_embeddings() is None:
            self._refuse("an LM head to share", "none")

    def begin(self, target: PreTrainedModel, batch_size: int) -> MedusaSession:
        self.bind(target)
        return MedusaSession(self)

    def forward(self, features: Tensor) -> Tensor:
        """Return logits [medusa_num_heads, n, draft_vocab_size] for the last hidden states [n, hidden_size]."""
        x = features.to(self.block_weight.dtype).expand(self.config.medusa_num_heads, *features.shape)
        for weight, bias in zip(self.block_weight, self.block_bias, strict=True):
            x = x + F.silu(torch.baddbmm(bias, x, weight.transpose(1, 2)))
        if self.lm_weight is None:
            return self.shared.lm_logits(x)
        return torch.bmm(x, self.lm_weight.transpose(1, 2))

    def rollout(self, features: Tensor, input_ids: Tensor, num_steps: int) -> list[Tensor]:
        if num_steps > self.config.medusa_num_heads:
            raise ValueError(
                f"this Medusa has {self.config.medusa_num_heads} heads: got {num_steps} steps; ask for fewer"
            )
        batch, length = input_ids.shape[0], input_ids.shape[1] - num_steps
        logits = self(features[:, :length].flatten(0, 1))
        return [x.view(batch, length, -1) for x in logits[:num_steps]]

    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            # Blocks begin as the identity: with the target's LM head, each head first guesses the next token.
            init.zeros_(self.block_weight)
            init.zeros_(self.block_bias)
            if self.lm_weight is not None:
                init.normal_(self.lm_weight, std=self.config.initializer_range)
