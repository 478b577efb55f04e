"""The speculation loop: draft gamma tokens, verify all of them with one forward of the target, keep what it accepts.

    Read ──► session.extend          the tokens that the target read and kept, and their features
             session.propose ──► x_1 .. x_gamma ~ q      (or a tree)
             target(root, x_1 .. x_gamma) ──► p_0 .. p_gamma
             accept ──► alpha tokens and one more from p   (Leviathan et al., arXiv:2211.17192)
             cache.keep_paths            rows keep unlike numbers of tokens

Every row has its own length; a finished row leaves the batch, unless its cache is handed back to the caller.
"""

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.generation import GenerationConfig

from hf_kvopt.cache.paged import PagedCache
from hf_kvopt.draft.drafter import Draft, Drafter, DraftSession, Plan, Read
from hf_kvopt.draft.output import Output
from hf_kvopt.draft.policy import Policy
from hf_kvopt.draft.reader import Reader
from hf_kvopt.draft.reads import Pending, features_of, packed
from hf_kvopt.draft.scores import NodeScores
from hf_kvopt.draft.tree import TreeShape, shape_of
from hf_kvopt.draft.verify import Verdict, greedy_chain, greedy_tree, sampled_chain, sampled_tree, typical_tree
from hf_kvopt.errors import OutOfBlocks


class DraftSampler:
    """Turns a drafter's logits into tokens as the target samples: warped alike, so that q is close to p."""

    def __init__(self, scores: NodeScores, do_sample: bool) -> None:
        self.scores, self.is_greedy = scores, not do_sample

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.is_greedy:
            return logits.argmax(dim=-1), None
        q = torch.softmax(self.scores.warp(logits.float()), dim=-1)
        return torch.multinomial(q, 1)[:, 0], q


class Speculation:
    """One generate() call.

    Args:
        reader: the target and its cache, which has read `input_ids` but for nothing: see `run`.
        drafter: whose session drafts.
        policy: how much.
        output: where tokens go.
        scores: logits processors.
        config: of this call.
        is_typical: Medusa's acceptance instead of the lossless one.
        rows_may_leave: whether the cache is nobody else's, so that finished rows are dropped from it.
    """

    def __init__(
        self,
        reader: Reader,
        drafter: Drafter,
        policy: Policy,
        output: Output,
        scores: NodeScores,
        config: GenerationConfig,
        is_typical: bool,
        rows_may_leave: bool,
    ) -> None:
        self.reader, self.drafter, self.policy, self.output, self.scores = reader, drafter, policy, output, scores
        self.do_sample = bool(config.do_sample)
        self.is_typical = is_typical
        self.rows_may_leave = rows_may_leave
        self.is_even = bool(reader.cache.cache_config.compileable)  # rows must keep equally many tokens
        self.sampler = DraftSampler(scores, self.do_sample)
        self.rows = list(range(len(output.lens)))  # row of the output of each row of the reader
        self.pending = Pending()
        self.is_first_draft = True
        sampling = (config.temperature, config.top_k, config.top_p, config.min_p) if self.do_sample else None
        policy.begin(sampling, rows_may_leave)
        self.extra = {"output_hidden_states": True} if drafter.feature_layers else {}

    def run(self, prefill: Any, prompt: Read, session: DraftSession) -> None:
        """Decode until every row is done; `prefill` are the target's outputs for the prompt.

        `prompt.following` lacks its last column, which is sampled here.
        """
        logits = prefill.logits[:, -1:].float()
        verdict = self._verify(Draft(prompt.tokens[:, :0]), None, logits, self._prefixes(None, None))
        first = self._commit(verdict, logits)
        columns = torch.tensor(prompt.counts, device=prompt.tokens.device) - 1
        prompt.following[torch.arange(len(columns)), columns] = torch.tensor(
            [row[-1] for row in first], device=columns.device
        )
        self.pending.add(prompt)
        self._let_go(session)
        while self.output.active:
            self._step(session)

    def _step(self, session: DraftSession) -> None:
        batch, started = len(self.rows), time.perf_counter()
        plan = self.policy.plan(self.rows, self.output.remaining)
        draft, shape = self._draft(session, plan)
        fed, drafted = torch.cat([self._roots(), draft.tokens], dim=1), time.perf_counter()
        try:
            outputs = self.reader.forward(fed, shape, **self.extra)
        except OutOfBlocks:
            if fed.shape[1] == 1:
                raise
            # A capped pool has room for the tokens that will stay, not for those that are only tried.
            draft, shape, fed = Draft(fed[:, :0]), None, fed[:, :1]
            outputs = self.reader.forward(fed, None, **self.extra)
        logits = outputs.logits.float()
        verdict = self._verify(draft, shape, logits, self._prefixes(fed, shape))
        kept = self._commit(verdict, logits)
        paths = self._paths(verdict, kept)
        self.reader.keep(fed.shape[1], paths)
        self.pending.add(self._read(fed, kept, paths, outputs))
        proposed = [draft.tokens.shape[1] if shape is None else max(shape.depths)] * batch
        if shape is None and draft.lengths is not None:
            proposed = list(draft.lengths)
        accepted = {self.rows[i]: (proposed[i], len(verdict.paths[i])) for i, tokens in enumerate(kept) if tokens}
        num_tokens, ended = sum(len(tokens) for tokens in kept), time.perf_counter()
        draft_s = None if self.is_first_draft else drafted - started
        self.is_first_draft = self.is_first_draft and not plan.num_nodes
        self.policy.note_step(plan, batch, fed.shape[1], draft_s, ended - drafted, accepted, num_tokens)
        self._let_go(session)

    def _draft(self, session: DraftSession, plan: Plan) -> tuple[Draft, TreeShape | None]:
        """What the drafter proposes, and its shape where it is a tree; nothing where nothing is planned."""
        if not plan.num_nodes:
            return Draft(self._roots()[:, :0]), None
        started = time.perf_counter()
        # A drafter's many small steps are bound by what torch books for each tensor.
        with torch.inference_mode():
            if self.pending:
                session.extend(self.pending.take())
            draft = session.propose(plan, self.sampler)
        num_nodes, shape = draft.tokens.shape[1], None
        if draft.parents is not None and num_nodes:
            shape = shape_of(draft.parents[0].tolist(), num_nodes)
        depth = num_nodes if shape is None else max(shape.depths)
        seconds = time.perf_counter() - started
        self.policy.note_draft(plan, len(self.rows), depth, seconds, is_first=self.is_first_draft)
        return draft, shape

    def _verify(
        self, draft: Draft, shape: TreeShape | None, logits: Tensor, prefixes: Sequence[Sequence[Tensor]] | None
    ) -> Verdict:
        scores = self.scores(logits, prefixes, self.rows)
        self.last_scores = scores
        if not self.do_sample:
            choices = scores.argmax(dim=-1)
            self.choices = choices
            if shape is None:
                return greedy_chain(draft.tokens, choices, draft.lengths)
            return greedy_tree(draft.tokens[0].tolist(), shape, choices[0].tolist())
        p = torch.softmax(scores, dim=-1)
        self.choices = p.argmax(dim=-1)
        if self.is_typical and shape is None and len(p) == 1 and draft.tokens.shape[1]:
            length = draft.lengths[0] if draft.lengths is not None else draft.tokens.shape[1]
            shape = shape_of(range(-1, length - 1), length)
        if shape is None:
            return sampled_chain(draft.tokens, p, draft.q, draft.lengths)
        if self.is_typical:
            return typical_tree(draft.tokens[0].tolist(), shape, p[0], _draw_one)
        return sampled_tree(draft.tokens[0].tolist(), shape, p[0])

    def _paths(self, verdict: Verdict, kept: list[list[int]]) -> list[list[int]]:
        """Nodes of each row whose tokens stay in the cache: the root, and all that was accepted but the last token."""
        if self.is_even and len(kept) > 1:
            return [list(range(max(len(tokens) for tokens in kept)))] * len(kept)
        return [[0, *verdict.paths[row][: len(tokens) - 1]] if tokens else [] for row, tokens in enumerate(kept)]

    def _commit(self, verdict: Verdict, logits: Tensor) -> list[list[int]]:
        """Hand the tokens to the output; those of each row that it took, none for a row that was done before."""
        output = self.output
        kept: list[list[int]] = []
        tokens = verdict.tokens
        if self.is_even:
            # Any beginning of what was accepted is a valid sample, so the shortest row sets the pace.
            alive = [len(tokens[i]) for i, row in enumerate(self.rows) if not output.is_done[row]]
            tokens = [row[: min(alive)] for row in tokens]
        records = output.scores is not None or output.logits is not None
        for i, row in enumerate(self.rows):
            if output.is_done[row]:
                kept.append([])
                continue
            scores = raw = None
            if records:
                nodes = [0, *verdict.paths[i]][: len(tokens[i])]
                scores, raw = self.last_scores[i, nodes].clone(), logits[i, nodes].clone()
            kept.append(output.commit(row, tokens[i], scores, raw))
        return kept

    def _read(self, fed: Tensor, kept: list[list[int]], paths: list[list[int]], outputs: Any) -> Read:
        """What the drafter is told; a row that is done and cannot leave is told something or other."""
        features = features_of(outputs, self.drafter.feature_layers)
        nodes = [path or [0] for path in paths]
        following = [(tokens + [0] * len(path))[: len(path)] for tokens, path in zip(kept, nodes, strict=True)]
        firsts = [n - len(path) for n, path in zip(self.reader.read_lens, paths, strict=True)]
        positions = [first + offset for first, offset in zip(firsts, self.reader.offsets, strict=True)]
        return packed(fed, following, nodes, positions, features, self.choices)

    def _roots(self) -> Tensor:
        """[batch, 1]: the last token of each row."""
        output = self.output
        return output.ids[self.rows, [output.lens[row] - 1 for row in self.rows]][:, None]

    def _prefixes(self, fed: Tensor | None, shape: TreeShape | None) -> list[list[Tensor]] | None:
        """What plain decoding would have before each node's next token, where a processor looks at it."""
        if not self.scores.needs_prefix:
            return None
        texts = [self.output.ids[row, : self.output.lens[row]] for row in self.rows]
        if fed is None:
            return [[text] for text in texts]
        prefixes = []
        for text, tokens in zip(texts, fed, strict=True):
            if shape is None:
                whole = torch.cat([text, tokens[1:]])
                prefixes.append([whole[: len(text) + node] for node in range(len(tokens))])
            else:
                prefixes.append([torch.cat([text, tokens[shape.path_to(n)]]) for n in range(len(tokens))])
        return prefixes

    def _let_go(self, session: DraftSession) -> None:
        """Drop finished rows from the batch."""
        done = self.output.is_done
        if not self.rows_may_leave or self.is_even or not any(done[row] for row in self.rows):
            return
        left = [i for i, row in enumerate(self.rows) if not done[row]]
        if not left:
            return
        self.rows = [self.rows[i] for i in left]
        self.reader.select(left)
        with torch.inference_mode():
            if self.pending:
                session.extend(self.pending.take())
            session.select(left)


def _draw_one(p: Tensor) -> Tensor:
    """[rows] drawn from p [rows, vocab]."""
    return torch.multinomial(p, 1)[:, 0]


def align_rows(reader: Reader, output: Output) -> None:
    """Leave every row of the cache with all tokens but the last, as plain decoding does: padding behind ended rows."""
    width = max(output.lens) - 1
    missing = [width - length for length in reader.read_lens]
    if max(missing) == 0 or reader.cache.cache_config.compileable:
        return
    ids = [output.ids[row, n : n + max(missing)] for row, n in enumerate(reader.read_lens)]
    padded = [torch.nn.functional.pad(row, (0, max(missing) - len(row))) for row in ids]
    reader.forward(torch.stack(padded))
    reader.keep(max(missing), [list(range(n)) for n in missing])


def restore(cache: PagedCache, columns: int) -> None:
    """Take a failed call's tokens back out of `cache`, which had `columns` before."""
    surplus = int(cache.get_seq_length()) - columns
    if surplus > 0:
        cache.crop(-surplus)
