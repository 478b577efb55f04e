"""Batcher: continuous batching for any number of threads and coroutines.

submit ──► inbox ──► worker thread: engine.step() until nothing is left ──► Request: tokens as they come
"""

import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Hashable
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import compat
from hf_kvopt.batching.job import Job
from hf_kvopt.batching.request import Request
from hf_kvopt.batching.requirements import require_counts, require_seed
from hf_kvopt.batching.rules import Rules
from hf_kvopt.batching.settings import BatchConfig, Runtime
from hf_kvopt.batching.stats import BatchStats
from hf_kvopt.compat.ranks import text_group
from hf_kvopt.errors import CacheStateError, KVOptError, OutOfBlocks, UnsupportedModel

logger = logging.getLogger(__name__)


class Batcher:
    """Generates for many requests at once: rows join and leave a running batch, and no token is padding.

    Args:
        model: a decoder in evaluation mode. Its attention becomes this library's until `close`.
        cache: how keys and values are stored: "paged", or a format of `QuantizedPagedCache` ("int8", "k8v4", ...).
        max_tokens: hard cap on the tokens held over all requests, such as 200_000 or "200k"; where it is short, the
            requests that came last wait, or give way and go on later. None grows as needed.
        max_rows: requests that are computed at a time.
        prefill_chunk: prompt tokens that one step reads at most, beside one token of each request that decodes.
        block_size: tokens a block, a power of two from 16 to 256; 16 by default, 64 where the format seals blocks.
        prefix_sharing: find the beginnings of prompts again that were read before.
        skip_layers: layers that are not quantized; see `QuantizedPagedCache`.
        layer_formats: formats of single layers; see `QuantizedPagedCache`.
        draft: speculate: a draft head, its folder, an assistant model, "prompt_lookup", "lookahead", or what
            `speculative(...)` made. Each request drafts as deep as it gains by, up to a bound of tokens a step over all
            of them. Tokens stay what they are without, sampled ones of a seed as well.
        compile: compile the step of decoding rows (`torch.compile`, one graph); a `CompileConfig` of transformers says
            how. Rows are rounded up to a few sizes. Prompts, drafts, and rows in sealed or latent storage stay eager.
        host_tier: memory of the host, such as "16 GiB", for known texts that the device has no room for. They come
            back while other rows go on; rows that give way are copied there where that is quicker than reading their
            tokens again.
        disk_tier: folder of files for known texts; see `PrefixStore`.
        disk_limit: cap on these files; see `PrefixStore`.

    Greedy tokens are those of `model.generate` on the prompt alone, with that cache. A request's tokens do not depend
    on what else is computed; in other dtypes than float32 that holds up to rounding, as for any batch.

    Raises:
        UnsupportedModel: a model whose rows cannot be packed: with recurrent layers, an encoder, attention of its own;
            or one that ranks share (`generate_many` takes it).
        ValueError, TypeError: a setting that cannot work, or a model in training mode.

    Source: Orca, OSDI 2022 (iteration-level scheduling); PagedAttention, arXiv:2309.06180; Sarathi-Serve,
    arXiv:2403.02310 (prompts in chunks beside decoding rows).

    Examples:
        >>> with Batcher(model, cache="int8") as batcher:
        ...     request = batcher.submit(inputs.input_ids[0], max_new_tokens=8, do_sample=False)
        ...     tokens = request.result()
        >>> request.finish_reason
        'length'
    """

    def __init__(self, model: PreTrainedModel, cache: str = "paged", *, draft: Any = None, **settings: Any) -> None:
        self.config = BatchConfig(cache=cache, draft=draft, **settings)
        _require_whole(compat.unwrapped(model))
        self._worker = _Worker(Runtime(model, self.config))
        # Requests keep their batcher: one that nobody holds has none left.
        self._finalizer = weakref.finalize(self, self._worker.stop, cancel=True)

    def submit(
        self,
        input_ids: list[int] | Tensor,
        *,
        priority: float = 0.0,
        namespace: Hashable = None,
        seed: int | None = None,
        logprobs: int | None = None,
        **settings: Any,
    ) -> Request:
        """Queue a prompt; from any thread.

        Args:
            input_ids: token ids, [length] or [1, length].
            priority: the request counts as if it had come so many seconds earlier; it is never starved by others.
            namespace: beginnings of prompts are found within one namespace alone (users that must not learn of each
                other).
            seed: of the draws of this request; None draws one. On a CPU, sampled tokens are those of
                `torch.manual_seed(seed)` and `model.generate` on the prompt alone.
            logprobs: how many likeliest tokens to tell in `request.logprobs` beside each token and its own
                log-probability; None tells nothing.
            settings: those of `generate()`, `generation_config=`, `logits_processor=`, `stopping_criteria=`,
                `stop_strings=` with `tokenizer=`, and `max_time=` in seconds from now included.

        Raises:
            ValueError, TypeError: a setting that cannot work, an empty prompt, or one that can never fit.
            CacheStateError: the batcher is closed, or the model in training mode.
        """
        _require_place(priority, namespace)
        prompt, rules = self._prepared(input_ids, seed=seed, logprobs=logprobs, **settings)
        request = Request(prompt, keeps=self)
        self._worker.put(self._worker.runtime.engine.job(request, rules, priority, namespace))
        return request

    def check(self, input_ids: list[int] | Tensor, **settings: Any) -> None:
        """Raise what `submit` would raise, and queue nothing."""
        self._prepared(input_ids, **settings)

    def submit_samples(
        self, input_ids: list[int] | Tensor, n: int, *, seed: int | None = None, **settings: Any
    ) -> list[Request]:
        """Queue one prompt `n` times; its keys and values are computed once.

        Args:
            input_ids: token ids, [length] or [1, length].
            n: requests, one a sample.
            seed: of the first one, the others count on from there; None draws all of them.
            settings: see `submit`.
        """
        require_counts(n=n)
        require_seed(seed)
        seeds = [None] * n if seed is None else list(range(seed, seed + n))
        return [self.submit(input_ids, seed=one, **settings) for one in seeds]

    @property
    def stats(self) -> BatchStats:
        """Requests, tokens and blocks, so far and now."""
        return self._worker.runtime.engine.stats

    @property
    def error(self) -> BaseException | None:
        """The error that ended the worker; None while it is well."""
        return self._worker.error

    @property
    def is_closed(self) -> bool:
        """Tell whether no request is taken any more."""
        return self._worker.is_closing

    def check_integrity(self) -> None:
        """Raise KVOptError unless every block is free or held exactly as often as it is counted."""
        self._worker.runtime.engine.store.check_integrity()

    def close(self, *, cancel: bool = False) -> None:
        """Take no further requests, finish those that were submitted (or end them now), and free all memory."""
        self._worker.stop(cancel=cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(cancel=kind is not None)

    def _prepared(self, input_ids: list[int] | Tensor, **settings: Any) -> tuple[list[int], Rules]:
        worker = self._worker
        worker.require_open()
        if worker.runtime.model.training:
            raise CacheStateError("the model is in training mode: got a request for it; call model.eval() first")
        prompt = worker.runtime.prompt(input_ids)
        return prompt, worker.runtime.rules(prompt, **settings)


def _require_place(priority: float, namespace: Hashable) -> None:
    """Raise for what gives a request no place in the queue, or its text none among the known ones."""
    if not isinstance(priority, (int, float)) or not math.isfinite(priority):
        raise ValueError(f"priority must be a finite number of seconds: got {priority!r}")
    try:
        hash(namespace)
    except TypeError as error:
        raise TypeError(f"a namespace must be hashable, such as a name: got {namespace!r:.80}") from error


def _require_whole(model: PreTrainedModel) -> None:
    """Raise UnsupportedModel for a model that ranks share: requests come to each of them at times of its own."""
    group = text_group(model)
    if group is not None:
        raise UnsupportedModel(
            "a batcher takes requests when they come, and ranks that share a model must run the same forwards: got "
            f"{type(model).__name__} divided over {group.size()} ranks; call generate_many on every rank, with "
            "the same prompts"
        )


class _Worker:
    """The thread that steps an engine, and its inbox; begun by the first request."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.is_closing = False
        self.error: BaseException | None = None
        self._inbox: deque[Job] = deque()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._is_cancelling = self._is_ended = False

    def require_open(self) -> None:
        """Raise CacheStateError where no request is taken any more."""
        if self.is_closing:
            error = self.error
            why = "" if error is None else f", because its worker failed: {type(error).__name__}: {error}"
            raise CacheStateError(f"the batcher is closed{why}: got another request; make a new Batcher") from error

    def put(self, job: Job) -> None:
        """Hand a job over."""
        with self._changed:
            self.require_open()
            self._inbox.append(job)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="hf_kvopt batcher", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def stop(self, *, cancel: bool) -> None:
        """Take no further jobs; wait for those that are there, or end them."""
        with self._changed:
            self.is_closing = True
            self._is_cancelling |= cancel
            self._changed.notify_all()
            if self._thread is None and not self._is_ended:
                self._is_ended = True
                self.runtime.close("cancelled")
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            while self._take_in():
                if not self.runtime.engine.step() and not self.runtime.engine.is_idle:
                    raise OutOfBlocks("no request can go on: got blocks that are held by none; this is a bug")
        except BaseException as caught:  # whoever waits must learn of it, whatever it is
            error = caught
            logger.exception("the worker of a batcher failed")
        self._end(error)

    def _take_in(self) -> bool:
        """Wait for something to do and queue what came; False where all is done."""
        engine = self.runtime.engine
        with self._changed:
            while engine.is_idle and not self._inbox and not self.is_closing:
                self._changed.wait()
            if self.is_closing and (self._is_cancelling or (engine.is_idle and not self._inbox)):
                return False
            while self._inbox:
                engine.add(self._inbox.popleft())
        return True

    def _end(self, error: BaseException | None) -> None:
        reason = "cancelled" if error is None else "error"
        with self._changed:
            self.is_closing, self.error, self._is_ended = True, error, True
            for job in self._inbox:
                job.request.finish(reason, error)
            self._inbox.clear()
        try:
            self.runtime.close(reason, error)
        except KVOptError:
            logger.exception("a batcher could not give back what it held")
