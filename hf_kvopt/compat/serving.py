"""Names of transformers' continuous batching and of its server."""

import importlib
from typing import Any

from transformers.generation.continuous_batching import requests as batching_requests

from hf_kvopt.compat.names import find, missing

MAKE_MANAGER = "init_continuous_batching"  # (generation_config, continuous_batching_config, workload_hints)
KEPT_MANAGER = "_cached_continuous_batching_manager"  # on a model: a manager that outlives a call
LOAD_MODEL = "_load_model"  # of the server's ModelManager
READ_SETTINGS = "_build_generation_config"  # of the server's handlers: (body, model_generation_config, use_cb)
_batch_output = find(batching_requests, "GenerationOutput")
_batch_status = find(batching_requests, "RequestStatus")
_SERVER_NAMES = {
    "serve": ("Serve.start_server",),
    "serving.model_manager": (f"ModelManager.{LOAD_MODEL}",),
    "serving.utils": (
        "GenerationState.get_manager", "CBGenerateManager.init_cb", "CBGenerateManager.generate_streaming",
        "CBGenerateManager.generate_non_streaming", f"BaseHandler.{READ_SETTINGS}",
    ),
    "serving.server": ("build_server",),
}  # fmt: skip


def batch_output(
    request_id: str, prompt: list[int], tokens: list[int], logprobs: list[float], error: str | None, status: str
) -> Any:
    """Make what a manager of transformers' continuous batching gives of a request; `status` by its name."""
    return _batch_output(
        request_id=request_id,
        prompt_ids=prompt,
        generated_tokens=tokens,
        logprobs=logprobs,
        error=error,
        status=_batch_status[status],
    )


def server_modules() -> tuple[Any, Any, Any, Any]:
    """Import transformers' server: its modules `serve`, `model_manager`, `utils` and `server`.

    Raises:
        ImportError: packages that it needs are not installed.
        UnsupportedModel: a name that is built on is missing.
    """
    modules = [importlib.import_module(f"transformers.cli.{name}") for name in _SERVER_NAMES]
    for module, names in zip(modules, _SERVER_NAMES.values(), strict=True):
        for name in names:
            owner, _, attribute = name.partition(".")
            found = getattr(module, owner, None)
            if found is None or (attribute and not hasattr(found, attribute)):
                missing(f"{module.__name__}.{name}")
    serve, model_manager, utils, server = modules
    return serve, model_manager, utils, server
