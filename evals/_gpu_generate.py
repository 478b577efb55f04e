"""A whole `generate()` on a random model of Llama's shape: what a user of each cache would see."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import hf_kvopt
from evals._gpu_time import Bench

Row = dict[str, Any]


def make_model(bench: Bench) -> LlamaForCausalLM:
    """Return a bf16 model of 1.2 billion parameters (Llama-3.2-1B with a vocabulary of 32,000); tiny in a rehearsal."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
    }
    sizes |= {"num_key_value_heads": 8, "vocab_size": 32000}
    if bench.rehearsal:
        sizes = {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, max_position_embeddings=131072)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(bench.device):
            return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)


def sides(batch: int, prompt_len: int, new_tokens: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return each side's attention and the keyword arguments of `generate`."""
    capacity = batch * (prompt_len + new_tokens + 64)
    return {
        "DynamicCache eager": ("sdpa", {}),
        "StaticCache compiled": ("sdpa", {"cache_implementation": "static"}),
        "PagedCache eager": ("hf_kvopt", {"past_key_values": {"block_size": 64}}),
        "PagedCache compiled": (
            "hf_kvopt", {"past_key_values": {"block_size": 64, "compileable": True, "max_tokens": capacity}}
        ),
    }  # fmt: skip


def bench_generate(bench: Bench) -> Iterator[Row]:
    """Yield one row per workload and side; tokens a second over the whole call, after one call to warm up."""
    model = make_model(bench)
    workloads = [(2, 20, 4)] if bench.rehearsal else [(8, 8192, 128), (1, 1024, 128), (8, 1024, 128)]
    for batch, prompt_len, new_tokens in workloads:
        prompt = torch.randint(3, model.config.vocab_size, (batch, prompt_len), device=bench.device)
        first: torch.Tensor | None = None
        for name, (attention, options) in sides(batch, prompt_len, new_tokens).items():
            row: Row = {"bench": "generate", "side": name, "batch": batch, "prompt": prompt_len, "new": new_tokens}
            if bench.is_late:
                yield row | {"skipped": "out of time"}
                continue
            try:
                model.set_attn_implementation(attention)
                tokens, seconds = timed_generate(bench, model, prompt, new_tokens, options)
            except Exception as error:  # one side's failure must not cost the others' figures
                yield row | {"unavailable": f"{type(error).__name__}: {str(error).strip()[:200]}"}
                continue
            first = tokens if first is None else first
            # bf16 paths of other shapes part at near ties: where, is reported and not judged.
            same = (tokens == first)[:, prompt_len:].long().cumprod(dim=1).sum(dim=1).tolist()
            yield row | {
                "seconds": seconds,
                "tokens_s": batch * new_tokens / seconds,
                "tokens_equal_to_first_side": same,
            }
            gc.collect()


def timed_generate(
    bench: Bench, model: LlamaForCausalLM, prompt: torch.Tensor, new_tokens: int, options: dict[str, Any]
) -> tuple[torch.Tensor, float]:
    """Return the tokens and the seconds of the second of two calls."""
    seconds = 0.0
    generate: Callable[..., torch.Tensor] = getattr(model, "generate")  # noqa: B009  typed on a mixin of its own
    tokens = prompt
    for _ in range(2):
        call = dict(options)
        if "past_key_values" in call:
            call["past_key_values"] = hf_kvopt.PagedCache(model.config, **call["past_key_values"])
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        started = time.perf_counter()
        tokens = generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
            do_sample=False, pad_token_id=0, **call,
        )  # fmt: skip
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        seconds = time.perf_counter() - started
    return tokens, seconds
