"""Drafter that runs a smaller model of another tokenizer, for any batch size: drafts pass as text.

    target ids ─ decode ─► text ─ encode ─► assistant ids ─► assistant drafts ─ decode, encode ─► target ids

A draft that the way over the text spoils is rejected by the target, so it costs time and no token.
Source: universal assisted generation, transformers' `AssistedCandidateGeneratorDifferentTokenizers`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kvopt.prefix.texts import common_prefix
from hf_kvopt.speculation.drafters.assistant import is_sure, threshold_of
from hf_kvopt.speculation.drafters.assistant_reader import AssistantReader, empty_cache
from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession, Plan, Read, Sampler
from hf_kvopt.speculation.loop.requirements import require_states_taken_back


class RetokenizedDrafter(Drafter):
    """Drafter that runs a whole model of another tokenizer. Drafts are greedy and count as point masses.

    Args:
        model: the assistant, a decoder.
        tokenizer: the target's.
        assistant_tokenizer: the assistant's.

    Raises:
        ValueError: the assistant is an encoder-decoder, or has fewer embeddings than its tokenizer has tokens.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, assistant_tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self.model, self.ours, self.theirs = model, tokenizer, assistant_tokenizer
        vocab_size, num_tokens = model.config.get_text_config(decoder=True).vocab_size, len(assistant_tokenizer)
        if num_tokens > vocab_size:
            raise ValueError(
                f"assistant_tokenizer must be that of the assistant: got {num_tokens} tokens for a model "
                f"of {vocab_size}; pass the tokenizer that lies beside its weights"
            )
        if model.config.is_encoder_decoder:
            raise ValueError("the assistant must be a decoder: got an encoder-decoder model")

    def check(self, target: PreTrainedModel) -> None:
        require_states_taken_back(self.model, empty_cache(self.model))

    def begin(self, target: PreTrainedModel, batch_size: int) -> DraftSession:
        return _RetokenizedSession(self, target.config.get_text_config(decoder=True).vocab_size, batch_size)

    def encoded(self, text: str) -> list[int]:
        """Return the assistant's ids of a text; at least one, so that there is something to go on from."""
        ids: list[int] = self.theirs(text, add_special_tokens=False)["input_ids"]
        return ids or [self.theirs.bos_token_id or 0]

    def text_of(self, ids: list[int]) -> str:
        """Return the text of the target's ids, without special tokens."""
        return _decoded(self.ours, ids)

    def translated(self, text: str, ids: list[int], drafted: list[int]) -> list[int]:
        """Return the target's ids of what `drafted` adds to `text`, whose ids for the assistant are `ids`."""
        before, after = _decoded(self.theirs, ids), _decoded(self.theirs, ids + drafted)
        if not after.startswith(before):
            return []
        added = after[len(before) :]
        short: list[int] = self.ours(text, add_special_tokens=False)["input_ids"]
        whole: list[int] = self.ours(text + added, add_special_tokens=False)["input_ids"]
        return whole[len(short) :] if whole[: len(short)] == short else []


class _RetokenizedSession(DraftSession):
    """Session of an assistant, whose cache holds the ids `held` of each row."""

    def __init__(self, drafter: RetokenizedDrafter, vocab_size: int, batch_size: int) -> None:
        self.drafter, self.vocab_size = drafter, vocab_size
        self.threshold = threshold_of(drafter.model)
        self.texts: list[list[int]] = [[] for _ in range(batch_size)]  # the target's ids, the root last
        self.held: list[list[int]] = [[] for _ in self.texts]
        self.reader = self._new_reader()

    def extend(self, read: Read) -> None:
        firsts, following = read.tokens[:, :1].tolist(), read.following.tolist()
        for row, count in enumerate(read.counts):
            self.texts[row] += following[row][:count] if self.texts[row] else firsts[row] + following[row][:count]

    def propose(self, plan: Plan, sample: Sampler) -> Draft:
        texts = [self.drafter.text_of(ids) for ids in self.texts]
        ids = [self.drafter.encoded(text) for text in texts]
        drafted = self._drafted(ids, plan.gamma)
        chains = [
            self._usable(self.drafter.translated(*given), plan) for given in zip(texts, ids, drafted, strict=True)
        ]
        width = max(map(len, chains))
        tokens = torch.tensor([chain + [0] * (width - len(chain)) for chain in chains], dtype=torch.int64)
        return Draft(tokens.view(len(chains), width), lengths=[len(chain) for chain in chains])

    def select(self, rows: Sequence[int]) -> None:
        self.texts = [self.texts[row] for row in rows]
        if any(self.held):
            self.held = [self.held[row] for row in rows]
            self.reader.select(rows)
        else:
            self._start_over()

    def close(self) -> None:
        self.reader.close()

    def _start_over(self) -> None:
        """Hold an empty cache."""
        self.close()
        self.held = [[] for _ in self.texts]
        self.reader = self._new_reader()

    def _new_reader(self) -> AssistantReader:
        return AssistantReader(self.drafter.model, len(self.texts))

    def _drafted(self, ids: list[list[int]], gamma: int) -> list[list[int]]:
        """Return up to `gamma` ids of the assistant after each row of `ids`."""
        logits, drafted, goes_on = self._read(ids), [[] for _ in ids], [True] * len(ids)  # type: ignore[var-annotated]
        for depth in range(gamma):
            token = logits.argmax(-1)
            for chain, new, stays in zip(drafted, token.tolist(), goes_on, strict=True):
                chain += [new] if stays else []
            if self.threshold:
                sure = is_sure(logits, token, None, self.threshold)
                goes_on = [a and b for a, b in zip(goes_on, sure, strict=True)]
            if depth + 1 == gamma or not any(goes_on):
                break
            logits = self.reader.forward(token[:, None]).logits[:, -1]
            self.reader.read_lens = [length + 1 for length in self.reader.read_lens]
            self.held = [[*row, new] for row, new in zip(self.held, token.tolist(), strict=True)]
        return drafted

    def _read(self, ids: list[list[int]]) -> Tensor:
        """Let the cache hold `ids` and return logits [batch, vocab] after the last of each row, which is read anew."""
        kept = [min(common_prefix(mine, new), len(new) - 1) for mine, new in zip(self.held, ids, strict=True)]
        counts = [len(mine) - n for mine, n in zip(self.held, kept, strict=True)]
        # A row may be shorter than what another one takes back, or the text be written otherwise before the draft.
        if not self.reader.can_drop(counts):
            self._start_over()
            kept = [0] * len(ids)
        else:
            self.reader.drop(counts)
        logits = self.reader.read([row[n:] for row, n in zip(ids, kept, strict=True)])
        self.held = [list(row) for row in ids]
        return logits

    def _usable(self, chain: list[int], plan: Plan) -> list[int]:
        """Return the first ids of a chain that the target has logits for, at most `gamma`."""
        bad = next((i for i, token in enumerate(chain) if token >= self.vocab_size), len(chain))
        return chain[: min(bad, plan.gamma)]


def _decoded(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))
