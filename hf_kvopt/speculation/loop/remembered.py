"""Memory of what a policy learned, for later processes: one small file for each model, machine and kind of drafter.

    <home>/speculation/<hash of all that it depends on>.json      home: $HF_KVOPT_HOME, or ~/.cache/hf_kvopt

It holds step times by size and acceptance by depth, no text. A file that cannot be read, or was written for something
else, is ignored and said so; `HF_KVOPT_REMEMBER=0` keeps and reads none.
"""

import hashlib
import json
import logging
import os
import platform
import weakref
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from hf_kvopt.files import home_folder, write_whole
from hf_kvopt.speculation.drafters.base import Drafter
from hf_kvopt.speculation.loop.policy import Policy

logger = logging.getLogger(__name__)

_SAVE_EVERY = 128  # steps: writing the file takes about as long as some tenths of a step
_OWN_FIELDS = ("_name_or_path", "transformers_version", "_attn_implementation_autoset")


class Remembered:
    """Reads what is known of a model when a policy first meets it, and writes what was learned now and then."""

    def __init__(self, policy: Policy, drafter: Drafter) -> None:
        self._policy, self._drafter = policy, drafter
        self._model: weakref.ref[PreTrainedModel] | None = None
        self._facts: dict[str, Any] = {}
        self._saved = 0

    def meet(self, model: PreTrainedModel) -> None:
        """Let the policy learn what was kept of `model`, if it is met for the first time and nothing is known yet."""
        if os.environ.get("HF_KVOPT_REMEMBER") == "0" or (self._model is not None and self._model() is model):
            return
        is_first, self._model = self._model is None, weakref.ref(model)
        self._facts = facts_of(model, self._drafter)
        if not is_first:
            return
        path = _path(self._facts)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept["facts"] != self._facts:
                raise ValueError("it was written for another model or machine")
            self._policy.learn(kept["learned"])
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is ignored: got %s %s; it will be written anew", path, type(error).__name__, error)

    def note(self) -> None:
        """Write what was learned, if much was since the last time; a folder that cannot be written is no error."""
        stats = self._policy.stats
        num_steps = stats.steps + stats.plain_steps
        if not self._facts or num_steps < self._saved + _SAVE_EVERY:
            return
        self._saved = num_steps
        try:
            write_whole(_path(self._facts), json.dumps({"facts": self._facts, "learned": self._policy.learned()}))
        except OSError as error:
            logger.info("what speculation learned is not kept: %s", error)


def facts_of(model: PreTrainedModel, drafter: Drafter) -> dict[str, Any]:
    """Return what times and acceptance depend on, as JSON values."""
    config = {name: value for name, value in model.config.to_dict().items() if name not in _OWN_FIELDS}
    own = getattr(getattr(drafter, "model", drafter), "config", None)
    text = json.dumps([config, None if own is None else own.to_dict()], sort_keys=True, default=str)
    device = model.device
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "model": type(model).__name__,
        "config": hashlib.sha256(text.encode()).hexdigest(),
        "attention": str(model.config._attn_implementation),
        "dtype": str(model.dtype),
        "drafter": type(drafter).__name__,
        "device": f"{device.type} {card}",
        "threads": torch.get_num_threads(),
        "machine": platform.node(),
    }


def _path(facts: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:24]
    return home_folder() / "speculation" / f"{name}.json"
