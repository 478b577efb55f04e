"""What a decode step on a card asks of the host: Python calls a layer, with launches that do nothing."""

import sys
from types import FrameType
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import hf_kvopt
from hf_kvopt.kernels import devices
from hf_kvopt.kernels.triton import launch, prepared

pytest.importorskip("triton")
# Of Triton's own way from what it compiled to the driver, measured beside its real launcher over a driver that does
# nothing: two launches a layer.
OF_TRITON = 14
# Calls of the model's own attention module and cache, which ours stand in for.
OF_TRANSFORMERS = 24
MOST = {None: 121, "int8": 136, "int4": 170}


class Nothing:
    """Stands for a compiled kernel."""

    def __getitem__(self, grid: Any) -> Any:
        return "".format  # takes anything, and no function of Python is called


def _calls_of(num_layers: int, kind: str, format: str | None) -> int:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=num_layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, attn_implementation=kind,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    cache: Any = DynamicCache(config=config)
    if kind == hf_kvopt.ATTENTION_NAME:
        made = hf_kvopt.PagedCache if format is None else hf_kvopt.QuantizedPagedCache
        cache = made(config, **({} if format is None else {"format": format}))
    options = {hf_kvopt.CACHE_KEYWORD: cache, "use_cache": True}
    calls = 0

    def note(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        calls += event == "call"

    with torch.inference_mode():
        model(torch.arange(40)[None], **options)
        for _ in range(2):
            model(torch.tensor([[7]]), **options)
        sys.setprofile(note)
        try:
            model(torch.tensor([[8]]), **options)
        finally:
            sys.setprofile(None)
    return calls


def _calls_a_layer(kind: str, format: str | None = None) -> float:
    return (_calls_of(5, kind, format) - _calls_of(3, kind, format)) / 2


@pytest.mark.parametrize("format", MOST, ids=str)
def test_a_layer_of_a_decode_step_takes_few_calls(format: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _calls_a_layer("sdpa")
    monkeypatch.setattr(devices, "is_on_host", lambda tensor: False)
    for module in (devices, launch):
        monkeypatch.setattr(module, "INTERPRET", True)
    monkeypatch.setattr(launch, "INTERPRETER", launch.Target("sm90", 132, (9, 0)))
    monkeypatch.setattr(launch.Launch, "run", lambda self: Nothing())
    monkeypatch.setattr(prepared, "_known", {})
    ours = _calls_a_layer(hf_kvopt.ATTENTION_NAME, format) - plain + OF_TRANSFORMERS + OF_TRITON
    assert ours <= MOST[format]
    assert prepared._known, "no launch was prepared"
