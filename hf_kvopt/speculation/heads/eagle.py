"""EAGLE heads: one decoder layer that predicts the target's next features, and tokens from them.

    EAGLE-3    g_t = fc([low_t; mid_t; high_t])      h_t = layer([norm(e_{t+1}); norm(g_t)], g_t)
               logits_{t+2} = lm_head(norm(h_t))     over a draft vocabulary
    EAGLE-1/2  g_t = last hidden state               h_t = layer(fc([e_{t+1}; g_t]))
               logits_{t+2} = the target's lm_head(h_t)

e_{t+1} embeds the token after position t. Further steps feed h back in place of g.

Source: EAGLE-3, arXiv:2503.01840; EAGLE, arXiv:2401.15077; EAGLE-2, arXiv:2406.16858.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_kvopt.speculation.heads.base import HeadBase
from hf_kvopt.speculation.heads.config import EagleConfig
from hf_kvopt.speculation.heads.eagle_session import EagleSession
from hf_kvopt.speculation.heads.layer import Attend, EagleLayer, RolloutAttention, RotaryTable, linear, norm


class EagleHead(HeadBase):
    """EAGLE head of version 1, 2 or 3, depending on its config; see `EagleConfig`."""

    config_class = EagleConfig
    config: EagleConfig

    def __init__(self, config: EagleConfig) -> None:
        super().__init__(config)
        hidden, width = config.hidden_size, config.target_hidden_size
        is_3 = config.eagle_version == 3
        # Kept as attributes: a look-up in the config costs as much as a small operation at every drafting step.
        self.is_first_version, self.norms_output = not is_3, config.norm_output
        self.fc = nn.Linear(config.num_features * width if is_3 else 2 * hidden, hidden, bias=config.fc_bias)
        self.layers = nn.ModuleList([EagleLayer(config, idx) for idx in range(config.num_hidden_layers)])
        eps = config.rms_norm_eps
        self.input_norm = nn.RMSNorm(config.num_features * width, eps) if config.norm_before_fc else None
        self.fc_norm = None
        if config.fc_norm:
            self.fc_norm = nn.ModuleList([nn.RMSNorm(width, eps) for _ in range(config.num_features)])
        self.norm = nn.RMSNorm(hidden, eps) if is_3 else None
        has_lm_head = is_3 and config.own_lm_head
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False) if has_lm_head else None
        self.embed_tokens = nn.Embedding(config.vocab_size, hidden) if config.own_embeddings else None
        self._make_vocab_buffers()
        self.rotary = RotaryTable(config)
        self.feature_layers = tuple(config.target_layer_ids or ())
        self.post_init()

    @property
    def target_hidden_size(self) -> int:
        return self.config.target_hidden_size

    def bind(self, target: PreTrainedModel) -> None:
        super().bind(target)
        num_layers = target.config.get_text_config(decoder=True).num_hidden_layers
        if self.config.target_layer_ids is None:
            if num_layers < 4:
                self._refuse("at least 4 layers (2, n // 2 and n - 3 are read)", f"num_hidden_layers {num_layers}")
            self.feature_layers = default_layers(num_layers)
        if not all(-1 <= layer <= num_layers for layer in self.feature_layers):
            self._refuse(f"target_layer_ids {self.feature_layers}", f"num_hidden_layers {num_layers}")
        if self.embed_tokens is None and self.config.hidden_size != self.target_hidden_size:
            self._refuse(
                f"embeddings of the head's own width {self.config.hidden_size}",
                f"width {self.target_hidden_size}, to share them",
            )
        if self.lm_head is None and target.get_output_embeddings() is None:
            self._refuse("an LM head to share", "none")
        if self.lm_head is None and not self.is_first_version:
            self.__dict__["_lm_rows"] = self._rows_of(target.get_output_embeddings())

    @property
    def lm_weight(self) -> Tensor | None:
        """Return the weight [draft_vocab_size, hidden_size] that reads out tokens; None for EAGLE-1."""
        if self.lm_head is not None:
            return self.lm_head.weight
        if self.is_first_version:
            return None
        rows: Tensor | None = self.__dict__.get("_lm_rows")
        if rows is None:
            raise ValueError("this head reads out by its target's LM head: expected head.bind(target) before it is run")
        if rows.dtype != self.dtype or rows.device != self.device:
            rows = self.__dict__["_lm_rows"] = rows.to(self.device, self.dtype)
        return rows

    def _rows_of(self, lm_head: Any) -> Tensor:
        """Copy the rows of the target's LM head that the draft vocabulary names, in the head's dtype."""
        with align_module_device(lm_head), torch.no_grad():  # brings weights that are offloaded here
            weight: Any = getattr(lm_head, "weight", None)
            expected = (self.config.vocab_size, self.config.hidden_size)
            got = tuple(weight.shape) if isinstance(weight, Tensor) else None
            if got != expected or not weight.is_floating_point() or getattr(lm_head, "bias", None) is not None:
                self._refuse(
                    f"an LM head of {expected}, not quantized, without bias", f"{type(lm_head).__name__} {got}"
                )
            ids = self.to_target(torch.arange(self.config.draft_vocab_size, device=self.device))
            rows: Tensor = weight[ids.to(weight.device)].to(self.device, self.dtype)
        return rows

    def begin(self, target: PreTrainedModel, batch_size: int) -> EagleSession:
        self.bind(target)
        return EagleSession(self, batch_size)

    def forward(
        self,
        tokens: Tensor,  # [batch, q_len] int64: the token after each feature
        hidden: Tensor,  # [batch, q_len, hidden_size]: from `combine`, or the output of the step before
        rotation: Tensor,  # [batch | 1, q_len, 2, head_dim]: `rotary` of the positions
        attend: Attend,
        last: Tensor | None = None,  # [batch, 1] int64
    ) -> Tensor:
        """Return hidden states for `logits`, which are also the `hidden` of the next step.

        Returns:
            [batch, q_len, hidden_size], or [batch, 1, hidden_size] at the indices `last`.
        """
        embeds = self._embed(tokens).to(hidden.dtype)
        if self.is_first_version:
            hidden = linear(self.fc, torch.cat([embeds, hidden], dim=-1))
        layers = list(self.layers)
        for layer in layers:
            hidden = layer.forward(hidden, embeds, rotation, attend, last if layer is layers[-1] else None)
        return norm(self.norm, hidden) if self.norms_output and self.norm is not None else hidden

    def combine(self, features: Tensor) -> Tensor:
        """Project the target's features [..., num_features * target_hidden_size] to [..., hidden_size]."""
        features = features.to(self.fc.weight.dtype)
        if self.is_first_version:
            return features
        if self.input_norm is not None:
            features = self.input_norm(features)
        if self.fc_norm is not None:
            parts = features.chunk(len(self.fc_norm), dim=-1)
            features = torch.cat([norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)], dim=-1)
        return self.fc(features)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., draft_vocab_size] float32 of the output of `forward`."""
        weight = self.lm_weight
        if weight is None:
            return self.shared.lm_logits(hidden).float()
        if self.norm is not None and not self.norms_output:
            hidden = norm(self.norm, hidden)
        return torch.nn.functional.linear(hidden, weight).float()

    def rollout(self, features: Tensor, input_ids: Tensor, num_steps: int) -> list[Tensor]:
        length = input_ids.shape[1] - num_steps
        attend = RolloutAttention()
        hidden = self.combine(features[:, :length])
        positions = torch.arange(length, device=input_ids.device)[None]
        self.rotary.reserve(input_ids.shape[1], input_ids.device, hidden.dtype)
        logits = []
        for step in range(num_steps):
            rotation = self.rotary(positions + step, hidden.dtype)
            hidden = self(input_ids[:, 1 + step : 1 + step + length], hidden, rotation, attend)
            logits.append(self.logits(hidden))
        return logits

    def _embed(self, tokens: Tensor) -> Tensor:
        return self.shared.embeddings(tokens) if self.embed_tokens is None else self.embed_tokens(tokens)


def default_layers(num_layers: int) -> tuple[int, ...]:
    """Return the feature layers of EAGLE-3's authors: the inputs of blocks 2, n // 2 and n - 3 of n."""
    return 2, num_layers // 2, num_layers - 3


def draft_vocab_of(counts: Sequence[int] | Tensor, size: int) -> Tensor:
    """Return the `size` most frequent token ids, ascending, from counts [vocab_size]."""
    return torch.as_tensor(counts).topk(size).indices.sort().values
