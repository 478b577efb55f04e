"""The model under evaluation: a hub id, a path, the bundled reference model or a random shape."""

import argparse
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from evals._common.cli import BadArgumentError
from evals._common.shapes import SHAPES, random_model
from evals.reference_model import MODEL_PATH
from hf_kvopt import model_source

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Subject(NamedTuple):
    """A loaded model with the name it was requested by; random shapes have no tokenizer."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--shape`, `--dtype`, `--device` and `--device-map`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--model", help="hub id, path, or smollm2 (the bundled reference model)")
    which.add_argument("--shape", choices=sorted(SHAPES), help="a random model of this shape instead")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="%(default)s")
    parser.add_argument("--device", help="such as cpu or cuda:1 (cuda when there is one)")
    parser.add_argument("--device-map", help="hand placement to accelerate, such as auto")


def model_arguments(args: argparse.Namespace) -> list[str]:
    """Return arguments from which `add_model_arguments` reads the same choice, for a child process."""
    names = ("model", "shape", "dtype", "device", "device_map")
    chosen = ((name, getattr(args, name)) for name in names)
    return [f"--{name.replace('_', '-')}={value}" for name, value in chosen if value is not None]


def load_subject(args: argparse.Namespace) -> Subject:
    """Load the model that the arguments of `add_model_arguments` chose, ready to generate.

    Raises:
        BadArgumentError: the model cannot be loaded, or the device does not exist.
    """
    device = _device(args.device)
    if args.shape is not None:
        model = random_model(args.shape)
        nn.Module.to(model, device, DTYPES[args.dtype])
        return Subject(f"random-{args.shape}", model, None)
    source = model_source(args.model) if args.model else str(MODEL_PATH)
    placement = {"device_map": args.device_map} if args.device_map is not None else {}
    _check_source(source)
    try:
        model = AutoModelForCausalLM.from_pretrained(source, dtype=DTYPES[args.dtype], **placement).eval()
    except (OSError, ValueError) as error:
        raise BadArgumentError(f"cannot load model {source!r}: {_first_line(error)}") from error
    if not placement:
        model = model.to(device)
    return Subject(args.model or "reference_model", model, _tokenizer(source))


def check_length(subject: Subject, num_tokens: int) -> None:
    """Refuse more tokens than a model with learned positions has; rotary positions are unlimited.

    Raises:
        BadArgumentError: a position would lie outside the model's table.
    """
    config = subject.model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and num_tokens > limit and not getattr(config, "rope_parameters", None):
        raise BadArgumentError(f"{subject.name} has {limit} positions: got {num_tokens} tokens, use fewer")


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadArgumentError(f"cannot use device {name!r}: {_first_line(error)}") from error
    return device


def _check_source(source: str) -> None:
    """Fail at once if a path is missing, before the hub client tries the network."""
    if source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        path = Path(source).expanduser()
        if not (path / "config.json").is_file():
            raise BadArgumentError(f"no model at {source!r}: expected a hub id, or a folder that holds config.json")


def _tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer beside the model, if there is one."""
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError):
        return None


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
