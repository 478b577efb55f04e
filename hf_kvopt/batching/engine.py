"""Engine: one packed forward a step over decoding rows, drafts and prompts that are being filled; no threads.

    plan      which jobs, how many tokens of each                        Scheduler
    forward   [1, tokens] through the model, each token to the cache of its row
    choose    the next token of each row, and of each prompt that was read to its end
    settle    rows that are done leave and are filed, filled prompts join

Iteration-level scheduling as in Orca (OSDI 2022), over blocks as in PagedAttention (arXiv:2309.06180), prompts in
chunks beside decoding rows as in Sarathi-Serve (arXiv:2403.02310).
"""

import itertools
import time
from collections.abc import Hashable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt.batching.drafts import Drafts
from hf_kvopt.batching.graph import GraphStep
from hf_kvopt.batching.job import Job
from hf_kvopt.batching.reader import Fed, Outputs, PackedReader
from hf_kvopt.batching.request import Request
from hf_kvopt.batching.rows import Rows
from hf_kvopt.batching.rules import Rules
from hf_kvopt.batching.sampling import draw_alike
from hf_kvopt.batching.scheduler import Scheduler, StepPlan
from hf_kvopt.batching.stats import BatchStats, Counts
from hf_kvopt.errors import CacheStateError
from hf_kvopt.prefix.store import PrefixStore
from hf_kvopt.quant import CENTRE_TOKENS
from hf_kvopt.speculation.drafters.base import Drafter
from hf_kvopt.speculation.loop.reads import features_of


class Engine:
    """Runs the jobs of one model; one thread at a time.

    Args:
        model: with this library's attention, in evaluation mode.
        store: of the model, and of nobody else: what is counted before a step must be there in it.
        max_rows: jobs that are filled or decode at a time.
        prefill_chunk: prompt tokens of one step.
        shares: whether texts are found again.
        drafter: what drafts; None: nothing.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        store: PrefixStore,
        max_rows: int,
        prefill_chunk: int,
        shares: bool = True,
        drafter: Drafter | None = None,
    ) -> None:
        self.model, self.store = model, store
        self.rows = Rows(store)
        self.scheduler = Scheduler(store, self.rows, max_rows, prefill_chunk, shares)
        self.counts = Counts()
        self._numbers = itertools.count()
        self.drafts = None if drafter is None else Drafts(drafter, model)
        self.graph: GraphStep | None = None
        self.reader = PackedReader(model, self.drafts is not None and self.drafts.needs_features)
        self._learns = store.formats.format != "native" or bool(store.formats.layer_formats)

    @property
    def is_idle(self) -> bool:
        """Tell whether no job is left."""
        return self.scheduler.is_idle

    def job(self, request: Request, rules: Rules, priority: float = 0.0, namespace: Hashable = None) -> Job:
        """A job for a request; it counts as if it had come `priority` seconds earlier."""
        return Job(request, rules, (request.submitted_at - priority, next(self._numbers)), namespace)

    def add(self, job: Job) -> None:
        """Queue a job."""
        self.scheduler.add(job)

    @torch.no_grad()
    def step(self) -> bool:
        """Compute one forward, and take what it gives; returns whether there was anything to do.

        Raises:
            CacheStateError: the model is in training mode now.
            Exception: whatever the model raises; the engine is to be closed then.
        """
        if self.model.training:
            raise CacheStateError("the model is in training mode: got a batch that runs; call model.eval() first")
        self.scheduler.forget_keys()
        ended = self._drop_ended()
        plan = self.scheduler.plan(self._propose())
        self._forget_preempted()
        if not plan.is_empty:
            started = time.monotonic()
            outputs = self._forward(plan)
            self.scheduler.forget_keys()
            ended += self._take_all(plan, outputs)
            ended += self._leave()
            seconds = time.monotonic() - started
            self.counts.note(plan, seconds)
            self.scheduler.note_step(plan, seconds)
        is_waiting = plan.is_empty and not ended and self.scheduler.wait()
        self.counts.finished += len(ended)
        for job in ended:
            job.tell()
        return bool(ended) or not plan.is_empty or is_waiting

    @property
    def stats(self) -> BatchStats:
        """Counts of what was done so far and is held now; from any thread."""
        scheduler, counts, prefixes = self.scheduler, self.counts, self.store.stats()
        with self.store.lock:
            spaces = [(a.num_blocks, a.num_blocks - a.num_free) for a in self.store.allocators]
            known = self.store.index.num_evictable * len(spaces)
        used = sum(number for _, number in spaces)
        return BatchStats(
            waiting=len(scheduler.waiting) + len(scheduler.arriving),
            filling=len(scheduler.filling),
            decoding=len(self.rows.jobs),
            finished=counts.finished,
            steps=counts.steps,
            computed_tokens=counts.computed_tokens,
            prompt_tokens=prefixes.prompt_tokens,
            cached_tokens=prefixes.hit_tokens,
            new_tokens=counts.new_tokens,
            preemptions=scheduler.num_preempted,
            drafted_tokens=counts.drafted_tokens,
            accepted_tokens=counts.accepted_tokens,
            tokens_per_s=counts.tokens_per_s,
            num_blocks=sum(size for size, _ in spaces),
            used_blocks=used,
            row_blocks=used - known,
            evictions=prefixes.evictions,
            spilled_blocks=prefixes.spilled,
            restored_blocks=prefixes.restored,
        )

    def close(self, reason: str, error: BaseException | None = None) -> None:
        """End all jobs, and give all blocks back."""
        jobs = self.scheduler.jobs
        for job in jobs:
            job.close()
        self.scheduler.close()
        if self.drafts is not None:
            self.drafts.close()
        self.rows.close()
        self.store.free()
        for job in jobs:
            if not job.is_done:
                job.end(reason, error)
            job.tell()

    def _drop_ended(self) -> list[Job]:
        """Let cancelled jobs go, and those whose time is over; returns them."""
        for job in self.scheduler.jobs:
            if job.request.is_cancelled or job.rules.is_late():
                job.end("cancelled" if job.request.is_cancelled else "time")
        ended = self._leave()
        for queue in (self.scheduler.waiting, self.scheduler.filling):
            for job in [job for job in queue if job.is_done]:
                self.scheduler.file(job)
                job.close()
                queue.remove(job)
                ended.append(job)
        return ended

    def _propose(self) -> list[list[int]]:
        """Tokens to try behind each decoding row."""
        jobs = self.rows.jobs
        # The first tokens of a row decide how its keys are stored: none must be among them that is taken back.
        is_young = self._learns and min(self.rows.lengths, default=0) < CENTRE_TOKENS
        return [[] for _ in jobs] if self.drafts is None or is_young else self.drafts.propose(jobs)

    def _forget_preempted(self) -> None:
        if self.drafts is not None:
            for job in set(self.drafts.rows) - set(self.rows.jobs):
                self.drafts.leave(job)

    def _forward(self, plan: StepPlan) -> Outputs:
        """Logits of each decoding row and its draft, then of each prompt that is read to its end."""
        fed, places, num_fed = [], [], 0  # type: list[Fed], list[int], int
        started = time.monotonic()
        decoded = None if self.graph is None or any(plan.drafts) else self._decode()
        if self.rows.jobs and decoded is None:
            tokens = [[job.text[-1], *draft] for job, draft in zip(self.rows.jobs, plan.drafts, strict=True)]
            fed.append(Fed(self.rows.cache, tokens, self.rows.lengths))
            num_fed = sum(map(len, tokens))
            places += range(num_fed)
        for job, number in plan.portions:
            assert job.cache is not None
            job.request.begin()
            start = job.num_held
            fed.append(Fed(job.cache, [job.text[start : start + number]], [start]))
            num_fed += number
            if number == job.num_missing:
                places.append(num_fed - 1)
        outputs = self.reader.read(fed, places) if fed else Outputs(torch.empty(0), None)
        if decoded is not None:
            outputs = Outputs(torch.cat([decoded, outputs.logits]) if len(outputs.logits) else decoded, None)
        if self.drafts is not None:
            num_decoded = 0 if decoded is None else len(decoded)
            self.drafts.note_step(num_fed + num_decoded, time.monotonic() - started)
        return outputs

    def _decode(self) -> Tensor | None:
        """Logits of the decoding rows by the compiled step; None where they are to be read eagerly."""
        graph, rows = self.graph, self.rows
        needs_features = self.drafts is not None and self.drafts.needs_features
        bucket = None if graph is None or not rows.jobs or needs_features else graph.bucket_for(rows.cache)
        if graph is None or bucket is None:
            return None
        return graph.read(bucket, rows.cache, [job.text[-1] for job in rows.jobs], rows.lengths)

    def _take_all(self, plan: StepPlan, outputs: Outputs) -> list[Job]:
        """Take the next tokens of all rows, and of prompts that were read to their ends, which join.

        Returns:
            The jobs that were done with their prompt.
        """
        best: list[int] = outputs.logits.argmax(-1).tolist() if len(outputs.logits) else []
        features = None if self.drafts is None else features_of(outputs, self.drafts.drafter.feature_layers)
        first = 0
        for job, draft, drawn in zip(self.rows.jobs, plan.drafts, self._draws(plan, outputs), strict=True):
            here = slice(first, first + 1 + len(draft))
            fed = [job.text[-1], *draft]
            num_taken = self._take(job, draft, outputs.logits[here], best[here], drawn)
            if self.drafts is not None and num_taken:
                own = None if features is None else features[:, here]
                self.counts.accepted_tokens += self.drafts.note(job, fed, num_taken, own, best[here])
                self.counts.drafted_tokens += len(draft)
            first += 1 + len(draft)
        self.rows.cut_back(1 + max(map(len, plan.drafts), default=0))
        place, ended = first, []  # type: int, list[Job]
        for job, number in plan.portions:
            self.scheduler.file(job)
            if features is not None:
                job.features.append(features[:, first : first + number])
            first += number
            if not job.num_missing:
                self._take(job, [], outputs.logits[place : place + 1], best[place : place + 1])
                place += 1
                ended += self._join(job)
        return ended

    def _join(self, job: Job) -> list[Job]:
        """Let a job whose prompt is filled decode; returns it where it is done already."""
        self.scheduler.filling.remove(job)
        if job.is_done:
            job.close()
            return [job]
        if self.drafts is not None:
            features = torch.cat(job.features, dim=1) if job.features else None
            self.drafts.join(job, job.read_from, features)
            job.features = []
        self.rows.join(job)
        return []

    def _draws(self, plan: StepPlan, outputs: Outputs) -> list[int | None]:
        """First token of each decoding row that is drawn together with others; None where it is chosen by itself."""
        rules = [job.rules for job in self.rows.jobs]
        if sum(one.do_sample for one in rules) < 2:
            return [None] * len(rules)
        firsts = list(itertools.accumulate((1 + len(draft) for draft in plan.drafts[:-1]), initial=0))
        return draw_alike(rules, outputs.logits[firsts])

    def _take(self, job: Job, draft: list[int], logits: Tensor, best: list[int], drawn: int | None = None) -> int:
        """Take tokens, of logits [1 + len(draft), vocab] whose largest are `best`, until one is not as drafted.

        The first one may have been `drawn` before.

        Returns:
            How many were taken.
        """
        for place in range(1 + len(draft)):
            try:
                token = job.take(logits[place], best[place], None if place else drawn)
            except Exception as error:  # of the request's own processors and criteria: nobody else's business
                job.end("error", error)
                return place
            self.counts.new_tokens += 1
            if job.is_done or place == len(draft) or token != draft[place]:
                break
        return place + 1

    def _leave(self) -> list[Job]:
        """File the rows of jobs that are done, and let them go; returns these jobs."""
        leaving = [row for row, job in enumerate(self.rows.jobs) if job.is_done]
        ended = [self.rows.jobs[row] for row in leaving]
        if self.drafts is not None:
            for job in ended:
                self.drafts.leave(job)
        self.scheduler.file_rows(leaving)
        self.rows.leave(leaving)
        return ended
