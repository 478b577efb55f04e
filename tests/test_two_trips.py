"""The two trips of one layer, write and read: how much of this library's own Python a decode step runs."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_kvopt
from hf_kvopt.kernels.cpu.program import can_compile

PACKAGE = str(Path(hf_kvopt.__file__).parent)
# Calls of functions of this package, and files of it that are entered, for one layer of one step.
# int8 and int4 rotate keys and queries alike.
MOST = {None: (47, 16), "int8": (64, 18), "int4/int4": (64, 18)}


@contextmanager
def counted() -> Iterator[Counter[tuple[str, str]]]:
    """Count calls by file and function."""
    calls: Counter[tuple[str, str]] = Counter()

    def note(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE):
            calls[code.co_filename, code.co_qualname] += 1

    sys.setprofile(note)
    try:
        yield calls
    finally:
        sys.setprofile(None)


def step(num_layers: int, format: str | None) -> Counter[tuple[str, str]]:
    """Count the calls of one decode step of a model that has so many layers."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, attn_implementation="hf_kvopt",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    kind = hf_kvopt.PagedCache if format is None else hf_kvopt.QuantizedPagedCache
    cache = kind(config, **({} if format is None else {"format": format}))
    options = {hf_kvopt.CACHE_KEYWORD: cache, "use_cache": True}
    with torch.inference_mode():
        model(torch.arange(1, 21)[None], **options)
        model(torch.tensor([[7]]), **options)
        with counted() as calls:
            model(torch.tensor([[8]]), **options)
    return calls


@pytest.mark.skipif(not can_compile(), reason="without compiled kernels other functions are called")
@pytest.mark.parametrize("format", MOST, ids=["native", "int8", "int4 of single tokens"])
def test_a_layer_of_a_decode_step_takes_few_calls_and_files(format: str | None) -> None:
    few, many = step(3, format), step(5, format)
    layers = {name: (count - few[name]) / 2 for name, count in many.items() if count != few[name]}
    num_calls, num_files = sum(layers.values()), len({file for file, _ in layers})
    assert (num_calls, num_files) <= MOST[format], sorted((count, *name) for name, count in layers.items())
    assert num_calls <= MOST[format][0]
    assert num_files <= MOST[format][1]
