"""transformers' server with our parts: a loader that enables the model, settings by request, errors that say why.

    Serve ─► ModelManager          loads the model; ours enables it
          ─► GenerationState       one manager of continuous batching; ours takes the settings of each request
          ─► build_server          the app; ours answers bad input by 400, notices who hangs up, and has /metrics

Nothing of transformers is changed outside of the moment in which the server is made, but how handlers read settings.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple

from fastapi.responses import JSONResponse, PlainTextResponse

from hf_kvopt import compat
from hf_kvopt.batching.manager import SEED
from hf_kvopt.errors import CacheStateError

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[dict[str, Any]]]
Send = Callable[[dict[str, Any]], Awaitable[None]]


class Server(NamedTuple):
    """A server that is ready to run."""

    uvicorn: Any  # its `run()` serves until a signal
    close: Callable[[], None]  # end what is left, and free the model


def make_server(
    model: str, prepared: Callable[[Any], Any], *, host: str = "localhost", port: int = 8000, **options: Any
) -> Server:
    """Make transformers' server for one model.

    Args:
        model: hub id or folder.
        prepared: is given the loaded model, and returns the one to serve.
        host: address.
        port: 0 takes a free one.
        options: of transformers' `Serve`, such as `device` and `dtype`.
    """
    serve, managers, utils, app = compat.server_modules()

    class Loader(managers.ModelManager):  # type: ignore[misc, name-defined]
        """Enables what it loads."""

        def _load(self, *args: Any, **kwargs: Any) -> Any:
            return prepared(getattr(super(), compat.LOAD_MODEL)(*args, **kwargs))

    setattr(Loader, compat.LOAD_MODEL, Loader._load)

    class Serve(serve.Serve):  # type: ignore[misc, name-defined]
        """Is made without being started."""

        def start_server(self) -> None:
            """Leave it to the caller."""

    state = _state_class(utils)
    replaced = (
        (managers, "ModelManager", Loader),
        (utils, "GenerationState", state),
        (app, "build_server", _builder(app.build_server, state)),
        (utils.BaseHandler, compat.READ_SETTINGS, _reader(getattr(utils.BaseHandler, compat.READ_SETTINGS))),
    )
    with _replaced(replaced[:3]):
        setattr(*replaced[3])
        made = Serve(force_model=model, host=host, port=port, continuous_batching=True, non_blocking=True, **options)

    def close() -> None:
        made._generation_state.shutdown()
        made.reset_loaded_models()

    return Server(made.server, close)


@contextlib.contextmanager
def _replaced(parts: tuple[tuple[Any, str, Any], ...]) -> Iterator[None]:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in parts]
    for part in parts:
        setattr(*part)
    try:
        yield
    finally:
        for part in before:
            setattr(*part)


def _reader(read: Callable[..., Any]) -> Callable[..., Any]:
    """`read` of the body's settings, where a temperature means to sample, and a seed is that of its request."""

    def read_settings(self: Any, body: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seed = body.get("seed")
        if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
            raise ValueError(f"seed must be an integer: got {seed!r}")
        config = read(self, {name: value for name, value in body.items() if name != "seed"}, *args, **kwargs)
        if body.get("temperature") and body.get("generation_config") is None:
            config.do_sample = True
        setattr(config, SEED, seed)
        return config

    return read_settings


def _state_class(utils: Any) -> Any:
    """transformers' state of generation, whose manager gives each request its own settings."""

    class Manager(utils.CBGenerateManager):  # type: ignore[misc]
        """Checks a request, and hands its settings on, before transformers adds it."""

        def generate_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **kwargs: Any
        ) -> Any:
            self._settle(processor, inputs, gen_config, request_id)
            return super().generate_streaming(model, processor, inputs, gen_config, request_id=request_id, **kwargs)

        async def generate_non_streaming(
            self, model: Any, processor: Any, inputs: Any, gen_config: Any, request_id: str, **kwargs: Any
        ) -> Any:
            self._settle(processor, inputs, gen_config, request_id)
            try:
                return await super().generate_non_streaming(
                    model, processor, inputs, gen_config, request_id=request_id, **kwargs
                )
            except asyncio.CancelledError:  # the client hung up
                self._cb.cancel_request(request_id)
                raise

        def _settle(self, processor: Any, inputs: Any, config: Any, request_id: str) -> None:
            self._check_alive(request_id)
            self._cb.tokenizer = getattr(processor, "tokenizer", processor)
            self._cb.check(inputs["input_ids"], config)
            self._cb.settle(request_id, config)

    class State(utils.GenerationState):  # type: ignore[misc]
        """Makes `Manager`s."""

        _cb_manager: Any
        _cb_model_id: str | None

        def get_manager(self, model_id: str, use_cb: bool = False) -> Any:
            if use_cb and self._cb_manager is None:
                made: Any = Manager(cb_config=self._cb_config)
                self._cb_manager, self._cb_model_id = made, model_id
            return super().get_manager(model_id, use_cb=use_cb)

    return State


def _builder(build: Callable[..., Any], state_class: Any) -> Callable[..., Any]:
    """`build` of the app, with our answers."""

    def build_server(*args: Any, **kwargs: Any) -> Any:
        app = build(*args, **kwargs)
        state = next(part for part in (*args, *kwargs.values()) if isinstance(part, state_class))

        async def refuse(_: Any, error: Exception) -> Any:
            said = f"missing field {error}" if isinstance(error, KeyError) else str(error)
            return JSONResponse({"error": {"message": said, "type": "invalid_request_error"}}, status_code=400)

        async def unavailable(_: Any, error: Exception) -> Any:
            return JSONResponse({"error": {"message": str(error), "type": "server_error"}}, status_code=503)

        for kind in (ValueError, TypeError, KeyError):
            app.add_exception_handler(kind, refuse)
        app.add_exception_handler(CacheStateError, unavailable)
        app.add_middleware(HangUps)

        @app.get("/metrics")
        def metrics() -> Any:
            return PlainTextResponse(as_metrics(state))

        return app

    return build_server


def as_metrics(state: Any) -> str:
    """Counts of the running batcher as Prometheus reads them; empty before the first request."""
    manager = getattr(state._cb_manager, "_cb", None)
    batcher = getattr(manager, "batcher", None)
    if batcher is None:
        return ""
    return "".join(f"hf_kvopt_{name} {value}\n" for name, value in batcher.stats._asdict().items())


class HangUps:
    """ASGI middleware that cancels the work for a client who is gone: transformers notices it while streaming alone."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        work = asyncio.ensure_future(self.app(scope, messages.get, send))
        is_gone = False

        async def listen() -> None:
            nonlocal is_gone
            while not is_gone:
                message = await receive()
                is_gone = message["type"] == "http.disconnect"
                messages.put_nowait(message)
            await asyncio.sleep(0)
            work.cancel()

        listener = asyncio.ensure_future(listen())
        try:
            await work
        except asyncio.CancelledError:
            if not is_gone:
                work.cancel()
                raise
        finally:
            listener.cancel()
