"""Request: what `submit` returns; a stream of tokens for any thread, or for asyncio.

worker thread   put(token) put(token) ... finish(reason)
caller          for token in request        result()        await request        async for token in request
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any, NamedTuple

from hf_kvopt.batching.rules import TokenLogprob

logger = logging.getLogger(__name__)


class RequestStats(NamedTuple):
    """Times and counts of one request so far; times in seconds, None for what did not happen yet."""

    queue_s: float | None  # from submit to the first forward over its prompt
    first_token_s: float | None  # from submit to the first token
    total_s: float | None  # from submit to the end
    prompt_tokens: int
    cached_tokens: int  # of the prompt, found in the prefix store
    new_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int  # of the drafted ones


class Request:
    """One text that is being generated.

    Iterate over it for its new tokens as they come, or take all of them with `result()`; under asyncio `await` it, or
    use `async for`. Any number of threads may wait for one request.

    Args:
        prompt: token ids.
        keeps: kept alive as long as the request is.
    """

    def __init__(self, prompt: list[int], keeps: object = None) -> None:
        self.prompt = prompt
        self.is_cancelled = False
        self.tokens: list[int] = []
        self.times: list[float] = []  # of each token, on `time.monotonic`
        self.logprobs: list[TokenLogprob] = []
        self.finish_reason: str | None = None
        self.error: BaseException | None = None
        self.cached_tokens = self.preemptions = self.drafted_tokens = self.accepted_tokens = 0
        self.submitted_at = time.monotonic()
        self.started_at: float | None = None
        self.finished_at: float | None = None
        self._keeps = keeps  # the batcher, which ends with the last who holds it
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], None]] = []

    @property
    def is_done(self) -> bool:
        """Tell whether no further token comes."""
        return self.finish_reason is not None

    @property
    def stats(self) -> RequestStats:
        """Times and counts so far."""
        times = (self.started_at, self.times[0] if self.times else None, self.finished_at)
        queue_s, first_token_s, total_s = (None if at is None else at - self.submitted_at for at in times)
        return RequestStats(
            queue_s,
            first_token_s,
            total_s,
            len(self.prompt),
            self.cached_tokens,
            len(self.tokens),
            self.preemptions,
            self.drafted_tokens,
            self.accepted_tokens,
        )

    def cancel(self) -> None:
        """End the request with the tokens that it has; a no-op on one that is done."""
        self.is_cancelled = True

    def result(self, timeout: float | None = None) -> list[int]:
        """Wait for the end and return the new tokens, an end-of-text token included.

        `finish_reason` says why it ended: "stop" (end-of-text token, stop string or criterion), "length", "time" or
        "cancelled"; what was generated until then is returned.

        Args:
            timeout: seconds to wait; None waits as long as it takes.

        Raises:
            TimeoutError: it takes longer; the request goes on.
            Exception: what the request's own processors raised, or what ended the batcher.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self.is_done, timeout):
                raise TimeoutError(f"the request has {len(self.tokens)} tokens after {timeout} s, and goes on")
        self._raise()
        return list(self.tokens)

    def __iter__(self) -> Iterator[int]:
        place = 0
        while True:
            with self._changed:
                while not self.is_done and len(self.tokens) <= place:
                    self._changed.wait()
                new = self.tokens[place:]
            yield from new
            place += len(new)
            if self.is_done and place == len(self.tokens):
                self._raise()
                return

    def __await__(self) -> Generator[Any, None, list[int]]:
        return self._whole().__await__()

    async def __aiter__(self) -> AsyncIterator[int]:
        place = 0
        while True:
            await self._wait(place)
            new, is_done = self.tokens[place:], self.is_done
            for token in new:
                yield token
            place += len(new)
            if is_done and place == len(self.tokens):
                self._raise()
                return

    def begin(self) -> None:
        """Note that its first forward begins: for the batcher."""
        if self.started_at is None:
            self.started_at = time.monotonic()

    def put(self, token: int, logprob: TokenLogprob | None) -> None:
        """Add a token: for the batcher."""
        with self._changed:
            self.tokens.append(token)
            self.times.append(time.monotonic())
            if logprob is not None:
                self.logprobs.append(logprob)
            self._tell()

    def finish(self, reason: str, error: BaseException | None = None) -> None:
        """End: for the batcher; the first end counts."""
        with self._changed:
            if self.is_done:
                return
            self.finished_at = time.monotonic()
            self.error, self.finish_reason = error, reason
            self._tell()

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener`, in the batcher's thread, at every token and at the end; now, where it is done.

        An exception of a listener is logged, and changes nothing.
        """
        with self._changed:
            self._listeners.append(listener)
            is_done = self.is_done
        if is_done:
            self._call(listener)

    def _tell(self) -> None:
        self._changed.notify_all()
        for listener in list(self._listeners):
            self._call(listener)

    def _call(self, listener: Callable[[], None]) -> None:
        """Call a listener; one that raises must not end what others wait for."""
        try:
            listener()
        except Exception:
            logger.exception("a listener of a request failed")

    async def _whole(self) -> list[int]:
        while not self.is_done:
            await self._wait(len(self.tokens))
        self._raise()
        return list(self.tokens)

    async def _wait(self, place: int) -> None:
        """Until there are more than `place` tokens, or no more come."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits there any more
                loop.call_soon_threadsafe(changed.set)

        self.on_change(tell)
        try:
            while not self.is_done and len(self.tokens) <= place:
                await changed.wait()
                changed.clear()
        finally:
            with self._changed:
                self._listeners.remove(tell)

    def _raise(self) -> None:
        if self.error is not None:
            raise self.error
