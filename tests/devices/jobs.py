"""Jobs of a rank: `python -m tests.devices.jobs JOB,JOB FOLDER OUT RANK NUM_RANKS`, started by `ranks.run`.

Ranks meet through a file, so that no port is chosen. A job is the name of a function here, and what it returns or
raises is written to OUT as JSON before the next one begins.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_kvopt
from hf_kvopt import PagedCache, QuantizedPagedCache
from hf_kvopt.speculation.drafters.prompt_lookup import PromptLookup
from tests.helpers import generate, prompt
from tests.speculation.heads import tiny_head

INPUTS = prompt(25, 18)
PROMPTS = [list(range(start, start + 5 * (start % 7) + 3)) * 2 for start in range(3, 12)]
MODELS = ("llama", "qwen3_moe", "gemma3_text", "gpt_oss", "deepseek_v3")
CACHES: dict[str, dict[str, Any]] = {
    "paged": {},
    "int8": {"cache": "int8"},
    "int4": {"cache": "int4", "block_size": 16},
    "shared": {"prefix_sharing": True},
    "prompt lookup": {"draft": "prompt_lookup"},
    "shared int8, prompt lookup": {"cache": "int8", "prefix_sharing": True, "draft": "prompt_lookup"},
}


def load(folder: Path, num_ranks: int = 1, **config: int) -> PreTrainedModel:
    """Load the model of a folder, divided over ranks by tensor parallelism unless `config` says otherwise."""
    kwargs: dict[str, Any] = {}
    if num_ranks > 1:
        from transformers.distributed import DistributedConfig

        kwargs["distributed_config"] = DistributedConfig(**(config or {"tp_size": num_ranks}))
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="hf_kvopt", **kwargs).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def matrix(folder: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Return the tokens of each model under every cache, sharing and draft, with beams and seeded sampling."""
    return {name: matrix_of(folder / name, num_ranks) for name in MODELS}


def matrix_of(folder: Path, num_ranks: int) -> dict[str, Any]:
    """Return the tokens of one model."""
    model = load(folder, num_ranks)
    found: dict[str, Any] = {}
    for name, options in CACHES.items():
        if name == "int4" and folder.name == "deepseek_v3":
            options = {"cache": "int4/int4"}  # latents have no blocks to seal
        hf_kvopt.enable(model, **options)
        found[name] = [generate(model, INPUTS).tolist() for _ in range(2)]
        if options.get("prefix_sharing"):
            found[f"hits, {name}"] = hf_kvopt.prefix_store(model).stats().hits
        hf_kvopt.disable(model)
    found["beams"] = generate(model, INPUTS, PagedCache(config=model.config), num_beams=3).tolist()
    torch.manual_seed(7)
    found["sampling"] = generate(model, INPUTS, PagedCache(config=model.config), do_sample=True).tolist()
    return found


def four_heads(folder: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Return the tokens of a model that has four heads of keys and values."""
    return matrix_of(folder / "four heads", num_ranks)


def policies(folder: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Return the tokens under policies that drop blocks, and how many they dropped."""
    model = load(folder / "full", num_ranks)
    found: dict[str, Any] = {}
    kept: tuple[tuple[str, Any], ...] = (
        ("sinks and recent", hf_kvopt.SinkRecent(sinks=4, recent=16)),
        ("snapkv", hf_kvopt.SnapKV(keep=0.5)),
        ("pyramid", hf_kvopt.PyramidKV(keep=0.5)),
    )
    for name, policy in kept:
        for kind, options in ((PagedCache, {}), (QuantizedPagedCache, {"format": "int8"})):
            cache = kind(config=model.config, policy=policy, block_size=16, **options)
            tokens = generate(model, prompt(96, 71), cache).tolist()
            found[f"{name}, {kind.__name__}"] = [tokens, cache.stats().evicted]
    return found


def heads(folder: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Return the tokens with draft heads, which share the embeddings and the LM head of the divided target."""
    model = load(folder / "full", num_ranks)
    found = {}
    for name in ("eagle3", "eagle3 compiled", "medusa with the target's lm head"):
        drafting = hf_kvopt.speculative(tiny_head(name), gamma=3, fallback=False)
        hf_kvopt.enable(model, draft=drafting)
        found[name] = generate(model, INPUTS).tolist()
        found[f"{name} drafted"] = drafting.stats.steps > 0
        hf_kvopt.disable(model)
    return found


def batch(folder: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Return the tokens of a running batch with few blocks, by cache and draft."""
    model = load(folder / "full", num_ranks)
    found: dict[str, Any] = {}
    settings = {"max_new_tokens": 20, "do_sample": False, "max_rows": 3, "max_tokens": 288}
    for options in ({}, {"cache": "int8"}, {"draft": "prompt_lookup"}):
        found[str(options)] = hf_kvopt.generate_many(model, PROMPTS, **settings, **options)  # type: ignore[arg-type]
    found["sampled"] = hf_kvopt.generate_many(model, PROMPTS, max_new_tokens=9, do_sample=True, seed=3)
    return found


def batch_errors(folder: Path, rank: int, num_ranks: int) -> list[str]:
    """Return the errors of a batcher, of a time limit, and of prompts that differ; then the tokens of equal ones."""
    model = load(folder / "full", num_ranks)
    said = []
    for call in (
        lambda: hf_kvopt.Batcher(model),
        lambda: hf_kvopt.generate_many(model, PROMPTS, max_new_tokens=4, max_time=60.0),
        lambda: hf_kvopt.generate_many(model, [PROMPTS[rank]], max_new_tokens=4),
    ):
        try:
            call()
        except (ValueError, hf_kvopt.KVOptError) as error:
            said.append(f"{type(error).__name__}: {error}")
    return [*said, str(hf_kvopt.generate_many(model, PROMPTS, max_new_tokens=4))]


def local_heads(folder: Path, rank: int, num_ranks: int) -> list[int]:
    """Return the shape of the codes of one layer after a call."""
    model = load(folder / "full", num_ranks)
    cache = PagedCache(config=model.config)
    generate(model, INPUTS, cache)
    return list(cache.layers[0].pool.keys.codes.shape)


def slow_rank(folder: Path, rank: int, num_ranks: int) -> dict[str, Any]:
    """Return the tokens, how many were fed at each step, and what this rank had chosen, where rank 1 drafts late."""
    model = load(folder / "full", num_ranks)
    drafting = hf_kvopt.speculative("prompt_lookup")
    begin = PromptLookup.begin

    def begin_slowly(self: PromptLookup, *args: Any) -> Any:
        session = begin(self, *args)
        propose = session.propose

        def propose_slowly(*args: Any) -> Any:
            time.sleep(0.02 * rank)
            return propose(*args)

        session.propose = propose_slowly
        return session

    PromptLookup.begin = begin_slowly  # type: ignore[method-assign]
    own, chosen, fed = [], drafting.policy.plan, []

    def plan(*args: Any) -> Any:
        made = chosen(*args)
        own.append(list(made))
        return made

    drafting.policy.plan = plan  # type: ignore[method-assign]
    model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs["input_ids"].shape[1]), with_kwargs=True)
    hf_kvopt.enable(model, draft=drafting)
    tokens = generate(model, INPUTS, max_new_tokens=96).tolist()
    return {"tokens": tokens, "fed": fed, "own": own}


def unlike_options(folder: Path, rank: int, num_ranks: int) -> Any:
    """Enable another cache on each rank, then the same one, and return the tokens."""
    model = load(folder / "full", num_ranks)
    try:
        hf_kvopt.enable(model, cache=("paged", "int8")[rank])
    except hf_kvopt.CacheStateError as error:
        said = str(error)
    hf_kvopt.enable(model, cache="int8")
    return [said, generate(model, INPUTS).tolist()]


def unlike_prompts(folder: Path, rank: int, num_ranks: int) -> Any:
    """Generate from other prompts on each rank, then from equal ones, with shared prefixes."""
    model = hf_kvopt.enable(load(folder / "full", num_ranks), prefix_sharing=True)
    try:
        generate(model, prompt(25 - rank, 18))
    except hf_kvopt.CacheStateError as error:
        said = str(error)
    return [said, generate(model, INPUTS).tolist()]


def unlike_stores(folder: Path, rank: int, num_ranks: int) -> Any:
    """Clear the prefix store of one rank alone."""
    model = hf_kvopt.enable(load(folder / "full", num_ranks), prefix_sharing=True)
    generate(model, INPUTS)
    if rank:
        hf_kvopt.prefix_store(model).clear()
    generate(model, INPUTS)


def saved_store(folder: Path, rank: int, num_ranks: int) -> Any:
    """Save the prefix store of a divided model."""
    model = hf_kvopt.enable(load(folder / "full", num_ranks), prefix_sharing=True)
    generate(model, INPUTS)
    hf_kvopt.prefix_store(model).save(folder / f"store {rank}")


def absent_rank(folder: Path, rank: int, num_ranks: int) -> Any:
    """Enable on the first rank alone, while the other one is busy for longer than the others wait."""
    model = load(folder / "full", num_ranks)
    if rank:
        time.sleep(12)
        return None
    hf_kvopt.enable(model)


def dead_rank(folder: Path, rank: int, num_ranks: int) -> Any:
    """Kill the last rank in the middle of a speculative call."""
    model = hf_kvopt.enable(load(folder / "full", num_ranks), draft="prompt_lookup")
    generate(model, INPUTS)
    if rank:
        steps = iter(range(5))
        model.register_forward_pre_hook(
            lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(steps, None) is None else None
        )
    generate(model, INPUTS, max_new_tokens=64)


def too_few_heads(folder: Path, rank: int, num_ranks: int) -> Any:
    """Enable a model that has fewer heads of keys and values than there are ranks."""
    hf_kvopt.enable(load(folder / "full", num_ranks))


def pipeline(folder: Path, rank: int, num_ranks: int) -> Any:
    """Enable a model of which each rank has some layers, and generate with its own cache and attention afterwards."""
    model = load(folder / "full", num_ranks, pp_size=num_ranks)
    try:
        hf_kvopt.enable(model)
    except hf_kvopt.UnsupportedModel as error:
        said = str(error)
    model.set_attn_implementation("eager")
    row = {"input_ids": INPUTS["input_ids"][:1], "attention_mask": INPUTS["attention_mask"][:1]}
    return [said, generate(model, row).tolist()]


def pipeline_cache(folder: Path, rank: int, num_ranks: int) -> Any:
    """Hand a paged cache to a model of which each rank has some layers."""
    model = load(folder / "full", num_ranks, pp_size=num_ranks)
    generate(model, INPUTS, PagedCache(config=model.config))


JOBS: tuple[Callable[[Path, int, int], Any], ...] = (
    matrix, four_heads, policies, heads, batch, batch_errors, local_heads, slow_rank, unlike_options, unlike_prompts,
    unlike_stores, saved_store, absent_rank, dead_rank, too_few_heads, pipeline, pipeline_cache,
)  # fmt: skip


def main(jobs: str, folder: str, out: str, rank: int, num_ranks: int) -> None:
    """Join the group of ranks, do the jobs and write what they returned."""
    torch.set_num_threads(1)
    meeting = f"file://{Path(out).parent}/meeting"
    limit = timedelta(seconds=60)
    torch.distributed.init_process_group("gloo", meeting, rank=rank, world_size=num_ranks, timeout=limit)
    works = {work.__name__: work for work in JOBS}
    found: dict[str, Any] = {}
    for job in jobs.split(","):
        try:
            found[job] = {"returned": works[job](Path(folder), rank, num_ranks)}
        except Exception as error:
            found[job] = {"error": f"{type(error).__name__}: {error}"}
        Path(out).write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(0)  # without a farewell to ranks that may be gone


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
