"""`generate_many`: any number of prompts through one running batch, in the calling thread."""

from collections.abc import Iterable, Iterator, Sized
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import ranks
from hf_kvopt.batching.job import Job
from hf_kvopt.batching.request import Request
from hf_kvopt.batching.requirements import require_counts, require_seed
from hf_kvopt.batching.settings import BatchConfig, Runtime, split_settings
from hf_kvopt.compat.ranks import text_group
from hf_kvopt.errors import OutOfBlocks

_QUEUED = 2  # jobs that are prepared ahead, in rows of the batch


def generate_many(
    model: PreTrainedModel,
    prompts: Iterable[list[int] | Tensor],
    *,
    cache: str = "paged",
    progress: bool = False,
    seed: int | None = None,
    num_return_sequences: int = 1,
    **settings: Any,
) -> list[list[int]]:
    """Generate for any number of prompts, as many at a time as rows and blocks allow.

    Args:
        model: see `Batcher`.
        prompts: token ids of each, without padding; taken from the iterable as room comes up.
        cache: see `Batcher`.
        progress: show a bar that counts prompts.
        seed: of the first sample; each further one counts on from there. None draws all of them.
        num_return_sequences: samples of each prompt.
        settings: those of `Batcher` (`max_tokens`, `max_rows`, ...) and of `Batcher.submit` for every prompt.

    Returns:
        The new tokens of each prompt, in order; those of its samples follow each other.

    Raises:
        ValueError, TypeError: see `Batcher` and `Batcher.submit`.
        Exception: what a request's own processor raised; the others are lost as well.

    Examples:
        >>> outputs = generate_many(model, [[1, 2, 3], [4, 5]], max_new_tokens=4, do_sample=False)
        >>> [len(tokens) for tokens in outputs]
        [4, 4]
    """
    require_counts(num_return_sequences=num_return_sequences)
    require_seed(seed)
    own, settings = split_settings(settings)
    runtime = Runtime(model, BatchConfig(cache=cache, **own))
    requests: list[Request] = []
    try:
        jobs = _jobs(runtime, prompts, seed, num_return_sequences, settings, requests)
        columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, disable=not progress) as bar:
            task = bar.add_task("", total=_length(prompts, num_return_sequences))
            for _ in run_jobs(runtime, jobs):
                bar.advance(task)
        return [request.result() for request in requests]
    finally:
        runtime.close("cancelled")


def run_jobs(runtime: Runtime, jobs: Iterator[Job]) -> Iterator[Request]:
    """Run jobs in the calling thread, and yield their requests as they end.

    Args:
        runtime: of the model, with no other jobs.
        jobs: taken as room comes up, so that no more than a few are prepared ahead.
    """
    engine, config = runtime.engine, runtime.config
    running: list[Request] = []
    is_more = True
    while is_more or not engine.is_idle:
        while is_more and len(engine.scheduler.waiting) < _QUEUED * config.max_rows:
            job = next(jobs, None)
            is_more = job is not None
            if job is not None:
                _require_alike(runtime, job)
                running.append(job.request)
                engine.add(job)
        if not engine.step() and not engine.is_idle:
            raise OutOfBlocks("no request can go on: got blocks that are held by none; this is a bug")
        ended = [request for request in running if request.is_done]
        if ended:
            running = [request for request in running if not request.is_done]
            yield from ended


def _require_alike(runtime: Runtime, job: Job) -> None:
    """Raise where ranks that share a model would not run the same forwards."""
    if text_group(runtime.model) is None:
        return
    if job.rules.deadline is not None:
        raise ValueError(
            "max_time ends requests by each rank's own clock: got it for a model that ranks share; omit it"
        )
    rules = (job.rules.max_new_tokens, job.rules.do_sample)
    ranks.require_alike(runtime.model, "prompts", f"{rules} of {job.request.prompt}")


def _jobs(
    runtime: Runtime,
    prompts: Iterable[list[int] | Tensor],
    seed: int | None,
    num_samples: int,
    settings: dict[str, Any],
    requests: list[Request],
) -> Iterator[Job]:
    """A job for each sample of each prompt; its request is added to `requests`."""
    for input_ids in prompts:
        prompt = runtime.prompt(input_ids)
        for _ in range(num_samples):
            drawn = None if seed is None else seed + len(requests)
            rules = runtime.rules(prompt, seed=drawn, **settings)
            requests.append(Request(prompt))
            yield runtime.engine.job(requests[-1], rules)


def _length(prompts: Iterable[Any], num_samples: int) -> int | None:
    return len(prompts) * num_samples if isinstance(prompts, Sized) else None
