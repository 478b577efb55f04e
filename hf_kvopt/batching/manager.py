"""BatchManager: a batcher in the shape of transformers' `ContinuousBatchingManager`.

    model.generate_batch ──► init_continuous_batching ──► add_requests ──► get_result, until all are there ──► stop
    transformers serve   ──► init_continuous_batching ──► add_request ──► register_result_handler ──► stop

Both ask for a manager and know these methods alone. Theirs is built around a cache of its own; this one is a `Batcher`.
"""

import asyncio
import contextlib
import itertools
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from transformers import PreTrainedModel
from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.batching.batcher import Batcher
from hf_kvopt.batching.request import Request
from hf_kvopt.batching.settings import BatchConfig
from hf_kvopt.errors import CacheStateError

SEED = "hf_kvopt_seed"  # on a generation config: of the draws of its request
Handler = tuple[asyncio.AbstractEventLoop, Callable[[Any], None]]


class BatchManager:
    """Takes requests, and gives transformers' `GenerationOutput`s.

    Args:
        model: the model, enabled with `batching`.
        config: how to batch.
        generation_config: settings of all requests; None: the model's.
        return_logprobs: tell the log-probability of each new token.
    """

    warmed_up = True  # nothing is captured ahead of time

    def __init__(
        self,
        model: PreTrainedModel,
        config: BatchConfig,
        generation_config: GenerationConfig | None = None,
        return_logprobs: bool = False,
    ) -> None:
        self.model, self.config, self.return_logprobs = model, config, return_logprobs
        self.generation_config = generation_config or model.generation_config
        self.batcher: Batcher | None = None
        self._requests: dict[str, Request] = {}
        self._handlers: dict[str, Handler] = {}
        self._settings: dict[str, GenerationConfig] = {}
        self.tokenizer: Any = None  # for stop strings
        self._outputs: queue.Queue[Any] = queue.Queue()
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._is_taking = False

    @property
    def background_thread_status(self) -> "BatchManager":
        """The object on which transformers looks for `fatal_error`."""
        return self

    @property
    def fatal_error(self) -> BaseException | None:
        """The error that ended the worker; None while it is well."""
        return None if self.batcher is None else self.batcher.error

    def warmup(self) -> None:
        """Do nothing: see `warmed_up`."""

    def start(self) -> None:
        """Take requests from now on, with the model in evaluation mode, as transformers' own manager leaves it."""
        self.model.eval()
        if self.batcher is None or self.batcher.is_closed:
            self.batcher = Batcher(self.model, **vars(self.config))
        self._is_taking = True

    def is_running(self) -> bool:
        """Tell whether requests are taken and worked on."""
        return self._is_taking and self.batcher is not None and not self.batcher.is_closed

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """Take no further requests; finish those that are there, or cancel them with `hard_stop`.

        Args:
            block: wait for them, `timeout` seconds at most; those that are not done by then are cancelled.
            timeout: None waits as long as it takes.
            keep_for_next_session: keep known texts and memory for the next `start`.
            hard_stop: see above.
        """
        self._is_taking = False
        requests = list(self._requests.values())
        for request in requests if hard_stop else ():
            request.cancel()
        if not block:
            return
        end = None if timeout is None else time.monotonic() + timeout
        for request in requests:
            with contextlib.suppress(Exception):  # told to whoever waits for the request
                request.result(None if end is None else max(0.0, end - time.monotonic()))
        if not keep_for_next_session:
            self.destroy()
        else:
            setattr(self.model, compat.KEPT_MANAGER, self)

    def destroy(self) -> None:
        """Give all memory back."""
        if self.batcher is not None:
            self.batcher.close(cancel=True)

    def add_request(
        self,
        input_ids: Sequence[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **settings: Any,
    ) -> str:
        """Queue a prompt and return the name of its request; what is wrong with it is told by its output.

        Args:
            input_ids: token ids.
            request_id: name; None makes one.
            max_new_tokens: None: as the generation config says.
            streaming: give an output at every token, and not at the end alone.
            record_timestamps: give the time of each token.
            eos_token_id: None: as the generation config says; -1: none.
            settings: of `generate()`, for this request.
        """
        name = request_id if request_id is not None else f"req_{next(self._numbers)}"
        given: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_token_id": eos_token_id, **settings}
        base = self._settings.pop(name, self.generation_config)
        seed = getattr(base, SEED, None)
        config = self._config_with(base, {key: value for key, value in given.items() if value is not None})
        num_samples, config.num_return_sequences = config.num_return_sequences or 1, 1
        # transformers names the samples of a prompt so; the last one has the name of the request itself.
        names = [*(f"{name}__child#{i}" for i in range(num_samples - 1)), name]
        for each in names:
            try:
                if not self.is_running():
                    raise CacheStateError("this manager was stopped: got another request; call start() first")
                assert self.batcher is not None
                own = {"tokenizer": self.tokenizer, "logprobs": 0 if self.return_logprobs else None, "seed": seed}
                request = self.batcher.submit(list(input_ids), generation_config=config, **own)
            except (ValueError, TypeError, CacheStateError) as error:
                self._deliver(each, compat.batch_output(each, list(input_ids), [], [], f"{error}", "FAILED"))
                continue
            with self._lock:
                self._requests[each] = request
            request.on_change(_Teller(self, each, request, streaming, record_timestamps))
        return name

    def add_requests(
        self,
        inputs: Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **settings: Any,
    ) -> list[str]:
        """Queue prompts; see `add_request`."""
        shared = {"max_new_tokens": max_new_tokens, "streaming": streaming, "record_timestamps": record_timestamps}
        return [self.add_request(input_ids, **shared, **settings) for input_ids in inputs]  # type: ignore[arg-type]

    def cancel_request(self, request_id: str) -> None:
        """End a request with the tokens that it has."""
        with self._lock:
            request = self._requests.get(request_id)
        if request is not None:
            request.cancel()

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> Any:
        """Take the next output, or None after `timeout` seconds; of other requests than a named one it is put back."""
        try:
            output = self._outputs.get(timeout=timeout)
        except queue.Empty:
            return None
        if request_id is not None and output.request_id != request_id:
            self._outputs.put(output)
            return None
        return output

    def __iter__(self) -> Iterator[Any]:
        while self.is_running() or not self._outputs.empty():
            output = self.get_result(timeout=0.1)
            if output is not None:
                yield output

    def request_id_iter(self, request_id: str) -> Iterator[Any]:
        """Give the outputs of one request as they come."""
        while self.is_running() or not self._outputs.empty():
            output = self.get_result(request_id, timeout=0.1)
            if output is not None:
                yield output
                if output.is_finished():
                    return

    def register_result_handler(self, request_id: str, callback: Callable[[Any], None]) -> None:
        """Call `callback` in the running event loop with each output of a request, instead of queueing it."""
        loop = asyncio.get_running_loop()
        early: list[Any] = []
        others: list[Any] = []
        with self._lock:
            self._handlers[request_id] = loop, callback
            while not self._outputs.empty():
                output = self._outputs.get_nowait()
                (early if output.request_id == request_id else others).append(output)
            for output in others:
                self._outputs.put(output)
            if any(output.is_finished() for output in early):
                del self._handlers[request_id]
        for output in early:
            loop.call_soon(callback, output)

    def settle(self, request_id: str, config: GenerationConfig) -> None:
        """Let the next request of a name have settings of its own, in place of those of the manager."""
        self._settings[request_id] = config

    def check(self, input_ids: Sequence[int], config: GenerationConfig) -> None:
        """Raise what `add_request` would tell by an output of a request with these settings.

        Raises:
            ValueError, TypeError, CacheStateError: see `Batcher.submit`.
        """
        if self.batcher is not None:
            config = self._config_with(config, {})
            self.batcher.check(list(input_ids), generation_config=config, tokenizer=self.tokenizer)

    def _config_with(self, base: GenerationConfig, given: dict[str, Any]) -> GenerationConfig:
        if given.get("eos_token_id") == -1:
            given["eos_token_id"] = []
        config = GenerationConfig(**{**base.to_dict(), **given})
        # transformers' server says by this that the manager has a cache of its own.
        config.use_cache = True
        if config.max_new_tokens is not None:
            config.max_length = None
        return config

    def _deliver(self, name: str, output: Any) -> None:
        with self._lock:
            handler = self._handlers.get(name)
            if output.is_finished():
                self._requests.pop(name, None)
                self._handlers.pop(name, None)
            if handler is None:
                self._outputs.put(output)
                return
        loop, callback = handler
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
            loop.call_soon_threadsafe(callback, output)


class _Teller:
    """Turns the changes of one request into outputs."""

    def __init__(
        self, manager: BatchManager, name: str, request: Request, streaming: bool, record_timestamps: bool
    ) -> None:
        self.manager, self.name, self.request = manager, name, request
        self.streaming, self.record_timestamps = streaming, record_timestamps
        self.is_told = False

    def __call__(self) -> None:
        request = self.request
        if self.is_told or not (request.is_done or self.streaming):
            return
        self.is_told = request.is_done
        status = "FAILED" if request.error is not None else "FINISHED" if request.is_done else "DECODING"
        error = None if request.error is None else f"{type(request.error).__name__}: {request.error}"
        logprobs = [told.logprob for told in request.logprobs]
        output = compat.batch_output(self.name, request.prompt, list(request.tokens), logprobs, error, status)
        if self.record_timestamps:
            output.timestamps = list(request.times)
        self.manager._deliver(self.name, output)
