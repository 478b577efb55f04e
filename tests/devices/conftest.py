"""Tiny models on a disk, and groups of ranks that run once for all tests and workers that ask for them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from transformers import LlamaForCausalLM

from tests.attention.models import case_named
from tests.devices.jobs import MODELS
from tests.devices.ranks import run
from tests.helpers import tiny_config, tiny_model
from tests.models.tiny import build

Groups = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def models(shared_folder: Path) -> Path:
    """Write the tiny models, each to a folder of its name."""
    made = shared_folder / "models"
    with FileLock(shared_folder / "models.lock"):
        if not made.exists():
            tiny_model("full", "eager").save_pretrained(made / "full")
            four = tiny_config("full")
            four.update({"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 16})
            torch.manual_seed(0)
            LlamaForCausalLM(four).save_pretrained(made / "four heads")
            for name in MODELS:
                build(case_named(name)).save_pretrained(made / name)
    return made


@pytest.fixture(scope="session")
def group(models: Path, shared_folder: Path) -> Groups:
    """Return `ranks.run` over these models, which runs each list of jobs once."""

    def found(jobs: str, **options: Any) -> list[dict[str, Any]]:
        scratch = shared_folder / jobs[:40]
        with FileLock(f"{scratch}.lock"):
            if not scratch.exists():
                scratch.mkdir()
                (scratch / "found.json").write_text(json.dumps(run(jobs, models, scratch, **options)))
        return json.loads((scratch / "found.json").read_text())

    return found
