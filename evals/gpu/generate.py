"""Checks and timing of a whole `generate()` on a random model of Llama's shape, for each cache."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import transformers
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import hf_kvopt
from evals.gpu.jobs import Job
from evals.gpu.time import Bench

Row = dict[str, Any]
OLDEST_TRANSFORMERS = (5, 19)  # that the caches run with; kernels work with any
# name: (attention, options of our cache, options of theirs)
SIDES: dict[str, tuple[str, dict[str, Any] | None, dict[str, Any]]] = {
    "DynamicCache eager": ("sdpa", None, {}),
    "StaticCache compiled": ("sdpa", None, {"cache_implementation": "static"}),
    "PagedCache compiled": ("hf_kvopt", {"block_size": 64, "compileable": True}, {}),
    "PagedCache eager": ("hf_kvopt", {"block_size": 64}, {}),
}
WORKLOADS = ((8, 8192, 128), (1, 1024, 128), (8, 1024, 128))  # batch, prompt, new tokens


def why_not(side: str) -> str | None:
    """Return why a side cannot run here, or None."""
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if SIDES[side][1] is None or version >= OLDEST_TRANSFORMERS:
        return None
    oldest = ".".join(map(str, OLDEST_TRANSFORMERS))
    return f"hf_kvopt's caches need transformers >= {oldest}: got {transformers.__version__}; install a newer one"


def make_model(bench: Bench, dtype: torch.dtype, is_tiny: bool) -> LlamaForCausalLM:
    """Return a model of 1.2 billion parameters (Llama-3.2-1B with a vocabulary of 32,000), or a tiny one."""
    sizes: dict[str, Any] = {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000,
    }  # fmt: skip
    if is_tiny:
        sizes |= {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
        sizes |= {"num_key_value_heads": 2, "vocab_size": 64}
    config = LlamaConfig(**sizes, max_position_embeddings=131072)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(bench.device):
            model = LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(previous)
    model.generation_config.eos_token_id = None
    return model


def make_cache(model: LlamaForCausalLM, side: str, batch: int, tokens_of_a_row: int) -> hf_kvopt.PagedCache | None:
    """Return our cache for a side; None if `generate` makes its own."""
    ours = SIDES[side][1]
    if ours is None:
        return None
    capacity: dict[str, Any] = {"max_tokens": batch * (tokens_of_a_row + 64)} if "compileable" in ours else {}
    return hf_kvopt.PagedCache(model.config, **ours, **capacity)


def generate(
    bench: Bench,
    model: LlamaForCausalLM,
    side: str,
    prompt: torch.Tensor,  # [batch, prompt]
    mask: torch.Tensor,
    new_tokens: int,
    cache: hf_kvopt.PagedCache | None = None,  # an empty one, to be reused
) -> torch.Tensor:
    """Return prompt and new tokens of one side, [batch, prompt + new]."""
    attention, _, options = SIDES[side]
    cache = cache or make_cache(model, side, prompt.shape[0], prompt.shape[1] + new_tokens)
    if cache is not None:
        options = {hf_kvopt.CACHE_KEYWORD: cache}
    if bench.device.type == "cpu" and side.endswith("compiled"):
        # On a GPU generate() compiles these itself.
        options = options | {"compile_config": _eager_compilation()}
    model.set_attn_implementation(attention)
    call: Callable[..., torch.Tensor] = getattr(model, "generate")  # noqa: B009  typed on a mixin of its own
    return call(
        prompt, attention_mask=mask, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False,
        pad_token_id=0, **options,
    )  # fmt: skip


def _eager_compilation() -> CompileConfig:
    config = CompileConfig(backend="eager", mode="default")
    setattr(config, "_compile_all_devices", True)  # noqa: B010  declared there as None
    return config


def generate_jobs(bench: Bench) -> list[Job]:
    """Return a check for each side and, where compilation is slow, a call of each workload that fills its caches."""
    jobs = []
    for side in SIDES:
        if side != "DynamicCache eager":
            jobs.append(Job(f"generate float32 {side}", check_generate, (side,), f"generate {side}"))
    compiled = [side for side in SIDES if side.endswith("compiled") and not bench.rehearsal]
    return [Job(f"generate {w} {side}", warm_generate, (side, w)) for side in compiled for w in WORKLOADS] + jobs


def check_generate(bench: Bench, side: str) -> Row:
    """Check that left-padded rows in float32 give exactly the tokens of DynamicCache and SDPA."""
    reason = why_not(side)
    if reason is not None:
        return {"skipped": reason}
    model = make_model(bench, torch.float32, is_tiny=True)
    length, new_tokens = (12, 3) if bench.rehearsal else (300, 32)
    prompt = torch.randint(3, 64, (3, length), device=bench.device)
    mask = torch.ones_like(prompt)
    mask[1, : length // 3] = 0
    want = generate(bench, model, "DynamicCache eager", prompt, mask, new_tokens)
    got = generate(bench, model, side, prompt, mask, new_tokens)
    return {"tokens_that_differ": int((got != want).sum()), "passed": bool(torch.equal(got, want))}


def warm_generate(bench: Bench, side: str, workload: tuple[int, int, int]) -> Row:
    """Compile what a workload needs, with the shapes of its prefill and of one step."""
    reason = why_not(side)
    if reason is not None:
        return {"skipped": reason}
    batch, length, new_tokens = workload
    model = make_model(bench, torch.bfloat16, is_tiny=False)
    prompt = torch.randint(3, model.config.vocab_size, (batch, length), device=bench.device)
    generate(bench, model, side, prompt, torch.ones_like(prompt), new_tokens)
    return {}


def bench_generate(bench: Bench, failed: set[str]) -> Iterator[Row]:
    """Yield one row for each workload and side: tokens a second over the whole call, after one warm-up call."""
    model = make_model(bench, torch.bfloat16, is_tiny=bench.rehearsal)
    for batch, prompt_len, new_tokens in ((2, 10, 3),) if bench.rehearsal else WORKLOADS:
        prompt = torch.randint(3, model.config.vocab_size, (batch, prompt_len), device=bench.device)
        first: torch.Tensor | None = None
        for side in SIDES:
            row: Row = {"bench": "generate", "side": side, "batch": batch, "prompt": prompt_len, "new": new_tokens}
            reason = why_not(side) or ("out of time" if bench.is_late else None)
            if f"generate {side}" in failed:
                reason = "its check in float32 failed"
            if reason is not None:
                yield row | {"skipped": reason}
                continue
            # Static shapes for each side, as in a fresh process.
            torch._dynamo.reset()
            try:
                tokens, seconds = timed_generate(bench, model, side, prompt, new_tokens)
            except Exception as error:  # one side's failure must not cost the others' figures
                yield row | {"unavailable": f"{type(error).__name__}: {str(error).strip()[:200]}"}
                continue
            first = tokens if first is None else first
            # bf16 paths of other shapes diverge at near ties: reported, not judged.
            same = (tokens == first)[:, prompt_len:].long().cumprod(dim=1).sum(dim=1).tolist()
            yield row | {
                "seconds": seconds,
                "tokens_s": batch * new_tokens / seconds,
                "tokens_equal_to_first_side": same,
            }
            gc.collect()


def timed_generate(
    bench: Bench, model: LlamaForCausalLM, side: str, prompt: torch.Tensor, new_tokens: int
) -> tuple[torch.Tensor, float]:
    """Return the tokens and the seconds of the second of two calls."""
    seconds, tokens = 0.0, prompt
    # As transformers keeps its StaticCache from call to call, ours is kept too: graphs hold its addresses.
    cache = make_cache(model, side, prompt.shape[0], prompt.shape[1] + new_tokens)
    for _ in range(2):
        if cache is not None:
            cache.reset()
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        started = time.perf_counter()
        tokens = generate(bench, model, side, prompt, torch.ones_like(prompt), new_tokens, cache)
        if bench.device.type == "cuda":
            torch.cuda.synchronize(bench.device)
        seconds = time.perf_counter() - started
    return tokens, seconds
