"""Drafts of a batch: how many tokens are tried behind each row, and what the drafter is told of what came of them.

    row a   accepted 9 of 10    [x x x x x]     the k-th token of a row is worth the chance that all k are accepted
    row b   accepted 1 of 10    [ ]             tokens are given to rows where they are worth most, while they are
    row c   nothing known       [x]             worth what they cost, and a step's budget lasts

Each row has a drafting session of its own, as rows join and leave one by one. Whatever is drafted, the next token is
chosen as without it, and kept while it is the drafted one: tokens, sampled ones too, are those of plain decoding.
"""

import heapq
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt.batching.job import Job
from hf_kvopt.ranks import follow_first
from hf_kvopt.speculation.drafters.base import Drafter, DraftSession, Plan
from hf_kvopt.speculation.loop.costs import Times
from hf_kvopt.speculation.loop.reads import Pending, packed

_MAX_DEPTH = 8
# Tokens of one step over all rows, by default: as many as rows, and some more where few rows decode.
_PER_ROW, _LEAST = 1, 16
_PRIOR = 0.6  # acceptance before anything is known
_WEIGHT = 4.0  # drafted tokens that the acceptance of all rows, or the prior, counts for
_FORGET = 0.9  # what a step ago counts less
_GROWTH = 0.1  # a guess until it was measured: twice the tokens take a tenth longer


class Greedy:
    """Takes the drafter's first choice: it meets a target that draws by itself best, and needs no distribution."""

    is_greedy = True

    def __call__(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the likeliest tokens [batch] of logits [batch, vocab]."""
        return logits.argmax(dim=-1), None


class Acceptance:
    """Drafted and accepted tokens, those long ago for less."""

    def __init__(self) -> None:
        self.tried = self.accepted = 0.0

    def note(self, tried: int, accepted: int) -> None:
        """Note a step: tokens up to the first that was refused, and those before it; (0, 0) lets the past fade."""
        self.tried = _FORGET * self.tried + tried
        self.accepted = _FORGET * self.accepted + accepted

    def rate(self, before: float) -> float:
        """The chance that a token is accepted where those before it were; `before` while little is known."""
        return (self.accepted + _WEIGHT * before) / (self.tried + _WEIGHT)


class _Row:
    """A drafting session, what it was not told yet, and how much of its drafts was accepted; of one job."""

    def __init__(self, session: DraftSession) -> None:
        self.session, self.pending, self.acceptance = session, Pending(), Acceptance()


class Drafts:
    """Drafts for the rows of a batch.

    Args:
        drafter: what drafts.
        model: the target.
        budget: drafted tokens of a step over all rows; None: as many as rows, 16 at least.
    """

    def __init__(self, drafter: Drafter, model: PreTrainedModel, budget: int | None = None) -> None:
        self.drafter, self.model, self.budget = drafter, model, budget
        self.max_depth = min(_MAX_DEPTH, drafter.max_gamma or _MAX_DEPTH)
        self.rows: dict[Job, _Row] = {}
        self.overall = Acceptance()
        self.step_times = Times(_GROWTH)
        self.token_s = 0.0  # seconds that a drafted token takes to draft

    @property
    def needs_features(self) -> bool:
        """Tell whether the drafter reads hidden states of the target."""
        return bool(self.drafter.feature_layers)

    @torch.inference_mode()
    def propose(self, jobs: Sequence[Job]) -> list[list[int]]:
        """Tokens to try behind the last one of each decoding job."""
        drafts = []
        depths = follow_first(self.model, self.depths(jobs))  # they depend on measured times
        for job, depth in zip(jobs, map(int, depths), strict=True):
            drafts.append(self._draft(job, depth) if depth else [])
        return drafts

    def depths(self, jobs: Sequence[Job]) -> list[int]:
        """Return how deep to draft for each job."""
        budget = self.budget if self.budget is not None else max(_LEAST, _PER_ROW * len(jobs))
        overall = self.overall.rate(_PRIOR)
        rates = [self.rows[job].acceptance.rate(overall) for job in jobs]
        limits = [min(self.max_depth, job.rules.max_new_tokens - job.num_new - 1) for job in jobs]
        depths = [0] * len(jobs)
        line = self.step_times.line() if self.step_times else None
        expected, size = float(len(jobs)), len(jobs)  # tokens that a step gives, and reads
        heap = [(-rate, row) for row, rate in enumerate(rates) if limits[row] > 0]
        heapq.heapify(heap)
        while heap and budget > 0:
            worth, row = heapq.heappop(heap)
            # Worth it where it gives more tokens a second than the step does without it.
            if line is not None and -worth * line.at(size) <= (line.slope + self.token_s) * expected:
                break
            depths[row] += 1
            budget, size, expected = budget - 1, size + 1, expected - worth
            if depths[row] < limits[row]:
                heapq.heappush(heap, (worth * rates[row], row))
        return depths

    def join(self, job: Job, read_from: int, features: Tensor | None) -> None:
        """Begin to draft for a job whose prompt was read and whose first token was taken.

        Args:
            job: with the token that was taken last behind its text.
            read_from: first token that the target read since the job was admitted.
            features: [1, tokens read, width] of those, where the drafter needs them.
        """
        first = 0 if features is None else read_from
        row = _Row(self.drafter.begin(self.model, 1))
        fed = torch.tensor([job.text[first:-1]], device=self.model.device)
        row.pending.add(packed(fed, [job.text[first + 1 :]], [list(range(fed.shape[1]))], [first], features, None))
        self.rows[job] = row

    def note(
        self, job: Job, fed: Sequence[int], num_taken: int, features: Tensor | None, choices: Sequence[int]
    ) -> int:
        """Take in what a step gave a job; returns how many drafted tokens were accepted.

        Args:
            job: with the tokens that were taken behind its text.
            fed: its last token before the step, and its draft.
            num_taken: tokens that were taken.
            features: [1, len(fed), width].
            choices: the target's first choice behind each of `fed`.
        """
        row, accepted = self.rows[job], num_taken - 1
        num_tried = len(fed) - 1
        if num_tried:
            job.request.drafted_tokens += num_tried
            job.request.accepted_tokens += accepted
        tried = min(num_tried, accepted + 1)
        row.acceptance.note(tried, accepted if num_tried else 0)
        if num_tried:
            self.overall.note(tried, accepted)
        device, start = self.model.device, len(job.text) - num_taken - 1
        read = packed(
            torch.tensor([list(fed)], device=device),
            [job.text[-num_taken:]],
            [list(range(num_taken))],
            [start],
            features,
            torch.tensor([list(choices)], device=device),
        )
        row.pending.add(read)
        return accepted if num_tried else 0

    def note_step(self, num_tokens: int, seconds: float) -> None:
        """Note how long a forward over so many tokens took."""
        self.step_times.note(num_tokens, seconds)
        if self.rows and not any(row.acceptance.tried >= 1 for row in self.rows.values()):
            self.overall.note(0, 0)  # in a pause what was learned fades, so that it is tried again

    def leave(self, job: Job) -> None:
        """Forget a job that is done, or gave way."""
        row = self.rows.pop(job, None)
        if row is not None:
            row.session.close()

    def close(self) -> None:
        """Forget all jobs."""
        for job in list(self.rows):
            self.leave(job)

    def _draft(self, job: Job, depth: int) -> list[int]:
        row, started = self.rows[job], time.monotonic()
        if row.pending:
            row.session.extend(row.pending.take())
        draft = row.session.propose(Plan(depth, depth), Greedy())
        if draft.parents is not None:
            draft = draft.first_chain()
        tokens: list[int] = draft.tokens[0].tolist()
        tokens = tokens[: draft.lengths[0]] if draft.lengths is not None else tokens
        tokens = tokens[:depth]
        if tokens:
            taken = (time.monotonic() - started) / len(tokens)
            self.token_s = taken if not self.token_s else 0.9 * self.token_s + 0.1 * min(taken, 4 * self.token_s)
        return tokens
