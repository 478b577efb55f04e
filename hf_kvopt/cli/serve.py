"""python -m hf_kvopt serve: transformers' own OpenAI-compatible server, over our blocks, formats, prefixes and drafts.

    clients ──► uvicorn, FastAPI, handlers of transformers ──► BatchManager ──► Batcher
                                                     /metrics ◄── its counts

Endpoints: /v1/chat/completions and /v1/completions (streamed too), /v1/responses, /v1/models, /health, /metrics. Each
request keeps its own temperature, top_p and seed.
"""

import argparse
import contextlib
import importlib
import logging
import signal
from collections.abc import Sequence
from typing import Any

from hf_kvopt.batching.settings import BatchConfig
from hf_kvopt.cli.screen import BATCHING, Parser, add_batching
from hf_kvopt.enable import enable
from hf_kvopt.packaged import model_source
from hf_kvopt.plan import BadInput

_EXAMPLES = """examples:
  python -m hf_kvopt serve HuggingFaceTB/SmolLM2-135M-Instruct --cache int8 --draft prompt_lookup
  curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "The sky is", "max_tokens": 20}'"""


def make_parser() -> Parser:
    """Describe the command line."""
    form = argparse.RawDescriptionHelpFormatter
    about = "Serve a model by an OpenAI-compatible API, with continuous batching."
    parser = Parser("python -m hf_kvopt serve", description=about, epilog=_EXAMPLES, formatter_class=form)
    add = parser.add_argument
    add("model", metavar="MODEL", help="hub id or folder")
    add_batching(parser, "requests")
    add("--compile", action="store_true", help="compile the step of decoding rows")
    add("--device", default="auto", help="such as cuda:0 or cpu (%(default)s)")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (%(default)s)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    add("--host", default="localhost", help="address to listen on (%(default)s)")
    add("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    add("--shutdown-timeout", type=int, default=30, help="seconds to finish requests after a signal (%(default)s)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Load the model and serve until a signal."""
    try:
        config = BatchConfig(compile=args.compile, **{name: getattr(args, name) for name in BATCHING})
    except ValueError as error:
        raise BadInput(str(error)) from None

    def prepared(model: Any) -> Any:
        return enable(model.eval(), cache=config.cache, batching=config)

    try:
        serving = importlib.import_module("hf_kvopt.cli.serving")
    except ImportError as error:
        needed = "serving needs packages that are not installed"
        raise BadInput(f"{needed}: got {error}; pip install 'hf-kvopt[serving]'") from None
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    options = {"device": args.device, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    server = serving.make_server(model_source(args.model), prepared, host=args.host, port=args.port, **options)
    server.uvicorn.config.timeout_graceful_shutdown = args.shutdown_timeout
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn takes both over while it runs
    try:
        with contextlib.suppress(KeyboardInterrupt):  # uvicorn hands the signal on when it is done
            server.uvicorn.run()
    finally:
        server.close()
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    return make_parser().run(run, argv)
