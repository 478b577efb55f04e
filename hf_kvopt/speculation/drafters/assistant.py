"""Drafter that runs a smaller model of the same tokenizer, with its own paged cache, for any batch size.

Source: Leviathan et al., arXiv:2211.17192; Chen et al., arXiv:2302.01318.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kvopt.prefix.texts import common_prefix
from hf_kvopt.speculation.drafters.assistant_reader import AssistantReader, empty_cache
from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession, Plan, Read, Sampler
from hf_kvopt.speculation.loop.requirements import require_states_taken_back


class AssistantDrafter(Drafter):
    """Drafter that runs a whole model.

    The draft of a row ends behind a token less probable than `assistant_confidence_threshold` of the assistant's
    generation config, if that is set (transformers' dynamic speculation, arXiv:2405.04304).

    Args:
        model: the assistant.
        tokenizer, assistant_tokenizer: tokenizers of the target and of the assistant; with both given, vocabulary sizes
            may differ by padding.

    Raises:
        ValueError: the tokenizers differ.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        assistant_tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model = model
        self.is_known_equal = tokenizer is not None and assistant_tokenizer is not None
        if tokenizer is not None and assistant_tokenizer is not None:
            ours, theirs = tokenizer.get_vocab(), assistant_tokenizer.get_vocab()
            if ours != theirs:
                raise ValueError(
                    f"the assistant must have the target's tokenizer: got {len(ours)} and {len(theirs)} tokens "
                    "that differ; use an assistant of the same family, or a draft head"
                )

    def check(self, target: PreTrainedModel) -> None:
        ours, theirs = (m.config.get_text_config(decoder=True).vocab_size for m in (target, self.model))
        if ours != theirs and not self.is_known_equal:
            raise ValueError(
                f"the assistant must have the target's tokenizer: got vocabularies of {ours} (target) and {theirs} "
                "(assistant); if they differ by padding only, pass tokenizer= and assistant_tokenizer= to speculative()"
            )
        if self.model.config.is_encoder_decoder:
            raise ValueError("the assistant must be a decoder: got an encoder-decoder model")
        require_states_taken_back(self.model, empty_cache(self.model))

    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        return _AssistantSession(self.model, target.config.get_text_config(decoder=True).vocab_size, batch_size)


class _AssistantSession(DraftSession):
    """Session of an assistant, whose cache holds the tokens of `extend` except those in `unread`."""

    def __init__(self, model: PreTrainedModel, vocab_size: int, batch_size: int) -> None:
        self.reader = AssistantReader(model, batch_size)
        self.vocab_size = vocab_size
        self.threshold = threshold_of(model)
        self.unread: list[list[int]] = [[] for _ in range(batch_size)]  # not fed yet; ends with the root
        self.drafted: list[Tensor] = []  # for each depth [batch]: drafted tokens in the cache

    def extend(self, read: Read) -> None:
        following = read.following.tolist()
        kept = [
            common_prefix(mine, new[: n - 1])
            for mine, new, n in zip(self._tried(), following, read.counts, strict=True)
        ]
        if self.drafted:
            num_tried = len(self.drafted)
            self.reader.read_lens = [length - num_tried for length in self.reader.read_lens]
            self.reader.keep(num_tried, [list(range(n)) for n in kept])
            self.drafted = []
        firsts = read.tokens[:, :1].tolist()
        for row, new in enumerate(following):
            if not self.unread[row] and not self.reader.read_lens[row]:
                self.unread[row] += firsts[row]
            self.unread[row] += new[kept[row] : read.counts[row]]

    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        logits = self._catch_up()
        tokens, qs = [], []  # type: tuple[list[Tensor], list[Tensor | None]]
        lengths, goes_on = [0] * len(self.unread), [True] * len(self.unread)
        for depth in range(plan.gamma):
            if depth:
                logits = self._logits(self.reader.forward(tokens[-1][:, None]).logits[:, -1])
                self.reader.read_lens = [length + 1 for length in self.reader.read_lens]
                self.drafted.append(tokens[-1])
            token, q = sample(logits)
            tokens.append(token)
            qs.append(q)
            lengths = [n + stays for n, stays in zip(lengths, goes_on, strict=True)]
            if self.threshold:
                sure = is_sure(logits, token, q, self.threshold)
                goes_on = [a and b for a, b in zip(goes_on, sure, strict=True)]
                if not any(goes_on):
                    break
        has_q = qs[0] is not None
        q = torch.stack(qs, dim=1) if has_q else None  # type: ignore[arg-type]
        return Draft(torch.stack(tokens, dim=1), q=q, lengths=lengths if self.threshold else None)

    def select(self, rows: Sequence[int]) -> None:
        self.unread = [self.unread[row] for row in rows]
        self.reader.select(rows)

    def close(self) -> None:
        self.reader.close()

    def _tried(self) -> list[list[int]]:
        """Return the drafted tokens that the cache holds, for each row."""
        if not self.drafted:
            return [[] for _ in self.unread]
        return torch.stack(self.drafted, dim=1).tolist()

    def _catch_up(self) -> Tensor:
        """Read the unread tokens, the root last, and return logits [batch, vocab] after the root."""
        unread, self.unread = self.unread, [[] for _ in self.unread]
        return self._logits(self.reader.read(unread))

    def _logits(self, logits: Tensor) -> Tensor:
        """Pad or cut logits to [batch, vocab] over the target's ids, so that padding is never drafted."""
        missing = self.vocab_size - logits.shape[-1]
        if missing > 0:
            return torch.nn.functional.pad(logits, (0, missing), value=float("-inf"))
        return logits[:, : self.vocab_size]


def threshold_of(model: PreTrainedModel) -> float:
    """Return the probability below which a draft of the assistant ends, 0 where none is set."""
    return float(getattr(model.generation_config, "assistant_confidence_threshold", None) or 0)


def is_sure(logits: Tensor, token: Tensor, q: Tensor | None, threshold: float) -> list[bool]:
    """Return for each row whether its token [batch], drawn from q or the best of logits, is at least that probable."""
    p = logits.float().softmax(-1) if q is None else q
    sure: list[bool] = (p.gather(-1, token[:, None].to(p.device))[:, 0] >= threshold).tolist()
    return sure
