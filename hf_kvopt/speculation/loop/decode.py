"""The speculation loop: draft gamma tokens, verify all of them with one forward of the target, keep what it accepts.

    Read ──► session.extend          the tokens that the target read and kept, and their features
             session.propose ──► x_1 .. x_gamma ~ q      (or a tree)
             target(root, x_1 .. x_gamma) ──► p_0 .. p_gamma
             accept ──► alpha tokens and one more from p   (Leviathan et al., arXiv:2211.17192)
             cache.keep_paths            each row keeps its own number of tokens

Every row has its own length. A finished row leaves the batch, unless its cache is handed back to the caller. If
something may depend on rows staying together, they do (see `lockstep`).
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.generation import GenerationConfig

from hf_kvopt.cache import recording
from hf_kvopt.errors import OutOfBlocks
from hf_kvopt.speculation.drafters.base import Draft, Drafter, DraftSession, Plan, Read
from hf_kvopt.speculation.loop.lockstep import walk
from hf_kvopt.speculation.loop.output import Output
from hf_kvopt.speculation.loop.policy import Policy, of_first_rank
from hf_kvopt.speculation.loop.reader import Reader
from hf_kvopt.speculation.loop.reads import Pending, features_of, packed
from hf_kvopt.speculation.loop.requirements import counts_columns, reads_trees
from hf_kvopt.speculation.loop.scores import DraftSampler, NodeScores
from hf_kvopt.speculation.loop.tree import TreeShape, shape_of
from hf_kvopt.speculation.loop.verify import (
    Verdict,
    greedy_chain,
    greedy_tree,
    sampled_chain,
    sampled_tree,
    typical_tree,
)


class Accepted(NamedTuple):
    """Result of one verification, for each row."""

    paths: list[list[int]]  # nodes that stay in the cache, the root first; empty for a finished row
    following: list[list[int]]  # tokens after them
    taken: list[list[int]]  # tokens that the output took
    num_drafted: list[int]  # accepted tokens of the draft


class Speculation:
    """Decodes one generate() call.

    Args:
        reader: the target and its cache, which holds the prompt.
        drafter: makes the drafts.
        policy: chooses the size of each draft.
        output: takes the tokens.
        scores: applies the logits processors.
        config: the generation config of the call.
        is_typical: use Medusa's acceptance instead of the lossless one.
        rows_may_leave: the cache belongs to this call alone, so that finished rows are dropped from it.
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
        self.do_sample, self.is_typical = bool(config.do_sample), is_typical
        self.in_lockstep = self._needs_lockstep(rows_may_leave)
        self.rows_may_leave = rows_may_leave and not self.in_lockstep
        self.reads_trees = reads_trees(reader.model) and not reader.cache.records_states
        self.num_skipped = reader.read_lens[0] - output.prompt_len  # columns before those of `input_ids`
        reader.last_column = output.max_length - 2 + self.num_skipped
        # Drafting the arg max is best where a token is drawn from the target's scores alone.
        self.sampler = DraftSampler(scores, self.do_sample and not self.in_lockstep)
        self.rows = list(range(len(output.lens)))  # row of the output for each row of the reader
        self.pending = Pending()
        self.is_first_draft = True
        sampling = (config.temperature, config.top_k, config.top_p, config.min_p) if self.do_sample else None
        policy.begin(sampling, self.rows_may_leave)
        self.extra = {"output_hidden_states": True} if drafter.feature_layers else {}

    def run(self, prefill: Any, prompt: Read, session: DraftSession) -> None:
        """Decode until every row is done; `prefill` holds the target's outputs for the prompt.

        `prompt.following` lacks its last column, which is sampled here.
        """
        accepted = self._accept(Draft(self._roots()[:, :0]), None, self._roots(), self._logits(prefill)[:, -1:])
        columns = torch.tensor(prompt.counts, device=prompt.tokens.device) - 1
        prompt.following[torch.arange(len(columns)), columns] = torch.tensor(
            [row[-1] for row in accepted.following], device=columns.device
        )
        self.pending.add(prompt)
        self._let_go(session)
        while self.output.active:
            self._step(session)

    def _step(self, session: DraftSession) -> None:
        batch, started = len(self.rows), time.perf_counter()
        plan = of_first_rank(self.reader.model, self.policy.plan(self.rows, self.output.remaining))
        if not self.reads_trees:
            plan = plan._replace(num_nodes=min(plan.gamma, plan.num_nodes))
        draft, shape = self._draft(session, plan)
        fed, drafted = self._fed(draft), time.perf_counter()
        try:
            outputs = self.reader.forward(fed, shape, **self.extra)
        except OutOfBlocks:
            if fed.shape[1] == 1:
                raise
            # A capped pool has room for the tokens that will stay, not for those that are only tried.
            recording.undo(self.reader.cache)
            draft, shape, fed = Draft(fed[:, :0]), None, fed[:, :1]
            outputs = self.reader.forward(fed, None, **self.extra)
        accepted = self._accept(draft, shape, fed, self._logits(outputs))
        self.reader.keep(fed.shape[1], accepted.paths)
        self._tell_later(fed, accepted, outputs)
        proposed = [draft.tokens.shape[1] if shape is None else max(shape.depths)] * batch
        if shape is None and draft.lengths is not None:
            proposed = list(draft.lengths)
        each = zip(self.rows, proposed, accepted.num_drafted, accepted.taken, strict=True)
        depths = {row: (tried, kept) for row, tried, kept, taken in each if taken}
        num_tokens, ended = sum(len(taken) for taken in accepted.taken), time.perf_counter()
        draft_s = None if self.is_first_draft else drafted - started
        self.is_first_draft = self.is_first_draft and not plan.num_nodes
        self.policy.note_step(plan, batch, fed.shape[1], draft_s, ended - drafted, depths, num_tokens)
        self._let_go(session)

    def _draft(self, session: DraftSession, plan: Plan) -> tuple[Draft, TreeShape | None]:
        """Return the draft, with its shape if it is a tree; empty if the plan is."""
        if not plan.num_nodes:
            return Draft(self._roots()[:, :0]), None
        started = time.perf_counter()
        # Inference mode: a drafter's many small steps are bound by torch's bookkeeping for each tensor.
        with torch.inference_mode():
            if self.pending:
                session.extend(self.pending.take())
            draft = _on(session.propose(plan, self.sampler), self.output.ids.device)
        if draft.parents is not None and not self.reads_trees:
            draft = draft.first_chain()
        num_nodes, shape = draft.tokens.shape[1], None
        if draft.parents is not None and num_nodes:
            shape = shape_of(draft.parents[0].tolist(), num_nodes)
        depth = num_nodes if shape is None else max(shape.depths)
        if not self.is_first_draft:
            self.policy.note_draft(len(self.rows), depth, time.perf_counter() - started)
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
            return typical_tree(draft.tokens[0].tolist(), shape, p[0], lambda p: torch.multinomial(p, 1)[:, 0])
        return sampled_tree(draft.tokens[0].tolist(), shape, p[0])

    def _accept(self, draft: Draft, shape: TreeShape | None, fed: Tensor, logits: Tensor) -> Accepted:
        """Commit the tokens of `fed`, roots and draft, that the target accepts, and the one after them."""
        output = self.output
        if self.in_lockstep:
            self.choices = logits.argmax(dim=-1)
            path, following, taken = walk(fed, logits, shape, output, self.scores, self.do_sample)
            batch = len(fed)
            return Accepted([path] * batch, following, taken, [len(path) - 1] * batch)
        verdict = self._verify(draft, shape, logits, self._prefixes(fed, shape))
        tokens: list[list[int]] = [[] for _ in output.lens]
        for i, row in enumerate(self.rows):
            if not output.is_done[row]:
                tokens[row] = verdict.tokens[i]
                if output.records:
                    nodes = [0, *verdict.paths[i]]
                    output.record(row, self.last_scores[i, nodes], logits[i, nodes])
        all_taken = output.commit(tokens)
        taken = [all_taken[row] for row in self.rows]
        paths = [[0, *verdict.paths[i]][: len(row)] for i, row in enumerate(taken)]
        return Accepted(paths, taken, taken, [len(path) for path in verdict.paths])

    def _tell_later(self, fed: Tensor, accepted: Accepted, outputs: Any) -> None:
        """Note what the drafter is told; a finished row that cannot leave gets its root and an arbitrary token."""
        features = features_of(outputs, self.drafter.feature_layers)
        nodes = [path or [0] for path in accepted.paths]
        following = [
            (tokens + [0] * len(path))[: len(path)] for tokens, path in zip(accepted.following, nodes, strict=True)
        ]
        places = zip(self.reader.read_lens, accepted.paths, self.reader.offsets, strict=True)
        firsts, device = [n - len(path) + offset for n, path, offset in places], self.reader.device
        fed, choices = fed.to(device), self.choices.to(device)
        self.pending.add_later(partial(packed, fed, following, nodes, firsts, features, choices))

    def _fed(self, draft: Draft) -> Tensor:
        """Return tokens to feed [batch, 1 + num_nodes], roots first; in lockstep with padding for finished rows."""
        fed = torch.cat([self._roots(), draft.tokens], dim=1)
        if self.in_lockstep and any(self.output.is_done):
            fed[torch.tensor(self.output.is_done, device=fed.device), 1:] = self.output.pad
        return fed

    def _roots(self) -> Tensor:
        """Return [batch, 1]: the last token of each row, or in lockstep the last column."""
        output = self.output
        if self.in_lockstep:
            return output.ids[:, output.width - 1, None]
        return torch.tensor([[output.lasts[row]] for row in self.rows], device=output.ids.device)

    def _prefixes(self, fed: Tensor, shape: TreeShape | None) -> list[list[Tensor]] | None:
        """Return the text before each node's next token, or None if no processor reads it."""
        if not self.scores.needs_prefix:
            return None
        prefixes = []
        for row, tokens in zip(self.rows, fed, strict=True):
            text = self.output.ids[row, : self.output.lens[row]]
            if shape is None:
                whole = torch.cat([text, tokens[1:]])
                prefixes.append([whole[: len(text) + node] for node in range(len(tokens))])
            else:
                prefixes.append([torch.cat([text, tokens[shape.path_to(n)]]) for n in range(len(tokens))])
        return prefixes

    def _logits(self, outputs: Any) -> Tensor:
        """Return logits [batch, q_len, vocab] float32 on the device of the output."""
        return outputs.logits.to(self.output.ids.device, torch.float32)

    def _needs_lockstep(self, rows_may_leave: bool) -> bool:
        """Return whether processors, criteria or the model can tell rows of different lengths from plain decoding."""
        output, is_fixed = self.output, self.reader.cache.cache_config.compileable
        sees_scores = bool(output.others) and output.scores is not None
        # A cache that is handed back has read padding behind ended rows, which states cannot be made to sum up later.
        is_summed = self.reader.cache.records_states and not rows_may_leave
        is_tied = is_fixed or is_summed or sees_scores or counts_columns(self.reader.model)
        return not self.is_typical and (self.scores.needs_lockstep or (len(output.lens) > 1 and is_tied))

    def align(self) -> None:
        """Fill the cache as plain decoding does: all tokens of each row but the last, and padding after ended rows.

        Their scores and logits are recorded after the padding.
        """
        output, reader, width = self.output, self.reader, self.output.width - 1
        if self.in_lockstep:
            return
        held = [length - self.num_skipped for length in reader.read_lens]
        # A row that a criterion ended late may hold tokens that were taken back.
        right = [min(n, length - 1) for n, length in zip(held, output.lens, strict=True)]
        reader.drop([n - kept for n, kept in zip(held, right, strict=True)])
        most = width - min(right)
        if not most:
            return
        ids = torch.nn.functional.pad(output.ids, (0, most), value=output.pad)
        fed = torch.stack([row[n : n + most] for row, n in zip(ids, right, strict=True)])
        logits = self._logits(reader.forward(fed))
        reader.keep(most, [list(range(width - n)) for n in right])
        if output.scores is None and output.logits is None:
            return
        prefixes = [[row[: n + 1 + node] for node in range(most)] for row, n in zip(ids, right, strict=True)]
        scores = self.scores(logits, prefixes, self.rows)
        for row, (n, length) in enumerate(zip(right, list(output.lens), strict=True)):
            behind = slice(length - 1 - n, width - n)
            output.record(row, scores[row, behind], logits[row, behind])

    def _let_go(self, session: DraftSession) -> None:
        """Drop finished rows from the batch."""
        done = self.output.is_done
        if not self.rows_may_leave or not any(done[row] for row in self.rows):
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


def _on(draft: Draft, device: torch.device) -> Draft:
    """Move `draft` to the device of the target's scores."""
    return draft._replace(tokens=draft.tokens.to(device), q=None if draft.q is None else draft.q.to(device))
