"""What EAGLE and Medusa heads have in common: their draft vocabulary, and whom they may draft for."""

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
        """[..., vocab_size] of [..., hidden_size]."""
        assert isinstance(self.lm_head, nn.Module)  # checked when the head was bound
        return self.lm_head(hidden.to(next(self.lm_head.parameters()).dtype))


class HeadBase(PreTrainedModel, Drafter):
    """A trained head that proposes tokens from a target's hidden states; `speculative(head)` takes it.

    A head knows the target that it was last bound to (by `check` and `begin`), whose embeddings or LM head it may
    share; these are not saved with it. One target at a time.
    """

    base_model_prefix = ""
    main_input_name = "features"
    _no_split_modules: list[str] = []  # noqa: RUF012
    can_tree = True
    follows_target = False  # whether `bind` moves it to the target's device

    d2t: Tensor | None  # [draft_vocab_size] int64: target token less draft token
    t2d: Tensor | None  # [vocab_size] bool: whether the head can propose a token

    def rollout(self, features: Tensor, input_ids: Tensor, num_steps: int) -> list[Tensor]:
        """Draft at all positions at once, the text itself being fed where a chain would feed its own tokens.

        Args:
            features: [batch, row_len, num_features * target_hidden_size].
            input_ids: [batch, row_len].
            num_steps: tokens to draft, at most row_len - 1.

        Returns:
            For each step i logits [batch, row_len - num_steps, draft_vocab_size]: at position t, of the token at
            t + 2 + i, which the target predicts at t + 1 + i.
        """
        raise NotImplementedError

    def bind(self, target: PreTrainedModel) -> None:
        """Check that `target` is the model this head was trained for, and share its embeddings or LM head.

        Raises:
            ValueError: hidden size, vocabulary, layers or device differ; the message names what.
        """
        config = target.config.get_text_config(decoder=True)
        self._require("hidden_size", self.target_hidden_size, config.hidden_size)
        # Medusa's first layout says nothing of the vocabulary.
        self._require("vocab_size", self.config.vocab_size or config.vocab_size, config.vocab_size)
        head_device, target_device = self.device, _device_of(target.get_input_embeddings())
        if target_device is not None and not _is_same(head_device, target_device):
            if not self.follows_target:
                raise ValueError(
                    f"the draft head must be where the target's embeddings are: got the head on {head_device} and the "
                    f"target on {target_device}; call head.to({str(target_device)!r})"
                )
            nn.Module.to(self, target_device)
        # Past nn.Module's registration: the target's weights are not the head's to save or to train.
        self.__dict__["_shared"] = Shared(target.get_input_embeddings(), target.get_output_embeddings())

    @property
    def shared(self) -> "Shared":
        """What the head uses of the target that it was bound to."""
        if "_shared" not in self.__dict__:
            raise ValueError("this head knows no target yet: expected head.bind(target) before the head is run")
        return self.__dict__["_shared"]

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_shared"}

    @property
    def target_hidden_size(self) -> int:
        """Width of the features."""
        return self.config.hidden_size

    def check(self, target: PreTrainedModel) -> None:
        self.bind(target)

    def to_target(self, draft_ids: Tensor) -> Tensor:
        """The target's ids of draft ids."""
        return draft_ids if self.d2t is None else draft_ids + self.d2t[draft_ids]

    def spread(self, logits: Tensor) -> Tensor:
        """[..., vocab_size] out of [..., draft_vocab_size]: minus infinity for what cannot be proposed."""
        if self.d2t is None:
            return logits
        full = logits.new_full((*logits.shape[:-1], self.config.vocab_size), float("-inf"))
        full[..., self.to_target(torch.arange(len(self.d2t), device=logits.device))] = logits
        return full

    def set_draft_vocab(self, token_ids: Tensor) -> None:
        """Propose these tokens of the target (ascending, as many as `draft_vocab_size`) and no others.

        Raises:
            ValueError: another number of tokens, or an order that the published layout cannot hold.
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
        """`d2t` and `t2d` where the draft vocabulary is smaller than the target's, else None."""
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
    """Where embeddings are computed; None where they are offloaded and nobody says."""
    device: torch.device = embeddings.weight.device  # type: ignore[assignment]
    if device.type != "meta":
        return device
    # accelerate's hook brings the weights there for the time of a forward.
    computes_on = getattr(getattr(embeddings, "_hf_hook", None), "execution_device", None)
    return None if computes_on is None else torch.device(computes_on)


def _is_same(a: torch.device, b: torch.device) -> bool:
    return a.type == b.type and (a.index == b.index or None in (a.index, b.index))
