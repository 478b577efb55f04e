"""Base of EAGLE and Medusa heads: the draft vocabulary, and the check of the target."""

from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init

from hf_kvopt.speculation.drafters.base import Drafter


class Shared(NamedTuple):
    """Modules of the target that its heads may use."""

    embeddings: nn.Module
    lm_head: nn.Module | None

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., vocab_size] for hidden states [..., hidden_size]."""
        assert isinstance(self.lm_head, nn.Module)  # checked when the head was bound
        return self.lm_head(hidden.to(next(self.lm_head.parameters()).dtype))


class HeadBase(PreTrainedModel, Drafter):
    """A trained head that proposes tokens from a target's hidden states; `speculative(head)` takes it.

    A head is bound to one target at a time, by `bind`, `check` or `begin`, and may share its embeddings or LM head;
    these are not saved with it.
    """

    base_model_prefix = ""
    main_input_name = "features"
    _no_split_modules: list[str] = []  # noqa: RUF012
    can_tree = True
    # Among 0.03, 0.05 and 0.1 the bundled head's speed-ups were 1 % apart (docs/notes/speculation.md).
    max_confidence = 0.05
    follows_target = False  # `bind` moves the head to the target's device

    d2t: Tensor | None  # [draft_vocab_size] int64: target token id minus draft token id
    t2d: Tensor | None  # [vocab_size] bool: True for tokens that the head can propose

    def rollout(self, features: Tensor, input_ids: Tensor, num_steps: int) -> list[Tensor]:
        """Draft at all positions at once, feeding the tokens of the text in place of drafted ones.

        Args:
            features: [batch, row_len, num_features * target_hidden_size].
            input_ids: [batch, row_len].
            num_steps: tokens to draft, at most row_len - 1.

        Returns:
            For each step i, logits [batch, row_len - num_steps, draft_vocab_size]: at position t for the token at
            t + 2 + i, which the target predicts at t + 1 + i.
        """
        raise NotImplementedError

    def bind(self, target: PreTrainedModel) -> None:
        """Check that `target` is the model that this head was trained for, and share its embeddings or LM head.

        Raises:
            ValueError: hidden size, vocabulary, layers or device differ; the message names which.
        """
        config = target.config.get_text_config(decoder=True)
        self._require("hidden_size", self.target_hidden_size, config.hidden_size)
        # Medusa's first layout does not store the vocabulary size.
        self._require("vocab_size", self.config.vocab_size or config.vocab_size, config.vocab_size)
        head_device, target_device = self.device, _device_of(target.get_input_embeddings())
        if target_device is not None and not _is_same(head_device, target_device):
            if not self.follows_target:
                raise ValueError(
                    f"the draft head must be where the target's embeddings are: got the head on {head_device} and the "
                    f"target on {target_device}; call head.to({str(target_device)!r})"
                )
            nn.Module.to(self, target_device)
        # Bypass nn.Module's registration: the head neither saves nor trains the target's weights.
        self.__dict__["_shared"] = Shared(target.get_input_embeddings(), target.get_output_embeddings())

    @property
    def shared(self) -> "Shared":
        """Return the modules of the target that the head was bound to."""
        if "_shared" not in self.__dict__:
            raise ValueError("this head knows no target yet: expected head.bind(target) before the head is run")
        return self.__dict__["_shared"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_shared", "_lm_rows")}

    @property
    def target_hidden_size(self) -> int:
        """Width of one feature layer."""
        return self.config.hidden_size

    def check(self, target: PreTrainedModel) -> None:
        self.bind(target)

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """Convert draft token ids to the target's."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def spread(self, logits: Tensor) -> Tensor:
        """Scatter logits [..., draft_vocab_size] to [..., vocab_size], filled with minus infinity."""
        if self.d2t is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        full[..., self.to_target(torch.arange(len(self.d2t), device=logits.device))] = logits
        return full

    def set_draft_vocab(self, token_ids: Tensor) -> None:
        """Restrict proposals to these token ids of the target: ascending, `draft_vocab_size` of them.

        Raises:
            ValueError: wrong number of tokens, or not in ascending order.
        """
        size = self.config.draft_vocab_size
        if self.d2t is None or self.t2d is None or len(token_ids) != size or bool((token_ids.diff() <= 0).any()):
            raise ValueError(
                f"the draft vocabulary must be {size} of {self.config.vocab_size} token ids in ascending order: got "
                f"{len(token_ids)}"
            )
        self.d2t.copy_(token_ids - torch.arange(len(token_ids), device=token_ids.device))
        self.t2d.zero_()
        self.t2d[token_ids] = True

    def _make_vocab_buffers(self) -> None:
        """Register `d2t` and `t2d`: None unless the draft vocabulary is smaller than the target's."""
        size, all_ids = self.config.draft_vocab_size, self.config.vocab_size
        d2t = t2d = None
        if size != all_ids:
            d2t, t2d = torch.zeros(size, dtype=torch.long), torch.zeros(all_ids, dtype=torch.bool)
            t2d[:size] = True
        self.register_buffer("d2t", d2t)
        self.register_buffer("t2d", t2d)

    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            init.normal_(module.weight, std=std)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=std)
        elif isinstance(module, nn.RMSNorm):
            init.ones_(module.weight)

    def _require(self, name: str, own: int, given: int) -> None:
        if own != given:
            self._refuse(f"{name} {own}", f"{name} {given}")

    def _refuse(self, own: str, given: str) -> NoReturn:
        raise ValueError(
            f"this {type(self).__name__} was made for a target with {own}: got one with {given}; load the head that "
            "was trained for this model"
        )


def _device_of(embeddings: nn.Module) -> torch.device | None:
    """Return the device that embeddings are computed on; None if they are offloaded to an unknown one."""
    device: torch.device = embeddings.weight.device  # type: ignore[assignment]
    if device.type != "meta":
        return device
    # accelerate's hook moves the weights there during a forward.
    computes_on = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return None if computes_on is None else torch.device(computes_on)


def _is_same(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index == b.index or None in (a.index, b.index))
