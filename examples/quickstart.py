"""The same text from the default cache and from hf_kvopt's paged cache, and what each one costs.

Run `python examples/quickstart.py` (the bundled model, no network), or with `--model HUB_ID --device cuda`.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache, DynamicCache, PreTrainedModel

import hf_kvopt

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(Path(__file__).parents[1] / "evals/reference_model/model"))
parser.add_argument("--prompt", default='import os\n\n\ndef read_lines(path):\n    """Return the lines of a file."""\n')
parser.add_argument("--new-tokens", type=int, default=100)
parser.add_argument("--device", default="cpu")
args = parser.parse_args()

# The whole length, also where the text could end before: speeds are compared.
length = {"min_new_tokens": args.new_tokens, "max_new_tokens": args.new_tokens}
# In float32 the tokens are equal to the last one; in bfloat16 any two attentions part at a near tie.
where = {"dtype": torch.float32, "device_map": args.device}
tokenizer = AutoTokenizer.from_pretrained(args.model)
inputs = tokenizer(args.prompt, return_tensors="pt").to(args.device)


def generate(model: PreTrainedModel, cache: Cache) -> tuple[torch.Tensor, float]:
    """Generate greedily through a cache: tokens [1, length], and new tokens a second."""
    start = time.perf_counter()
    tokens = model.generate(**inputs, **{hf_kvopt.CACHE_KEYWORD: cache}, **length, do_sample=False)
    return tokens, (tokens.shape[1] - inputs["input_ids"].shape[1]) / (time.perf_counter() - start)


# The default: transformers' own attention and cache.
model = AutoModelForCausalLM.from_pretrained(args.model, **where)
generate(model, DynamicCache(config=model.config))  # warm-up
default_cache = DynamicCache(config=model.config)
default_tokens, default_speed = generate(model, default_cache)
default_bytes = sum(t.nbytes for layer in default_cache.layers for t in (layer.keys, layer.values))

# Ours: name the attention when the model is loaded, and hand generate() the cache.
model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="hf_kvopt", **where)
generate(model, hf_kvopt.PagedCache())  # warm-up
with hf_kvopt.PagedCache() as paged_cache:  # the memory is given back where the block ends
    paged_tokens, paged_speed = generate(model, paged_cache)
    stats = paged_cache.stats()

# Ours in one call: from here on plain generate(), pipelines and streamers take both.
hf_kvopt.enable(model, cache="paged")
enabled_tokens = model.generate(**inputs, **length, do_sample=False)

print(tokenizer.decode(paged_tokens[0], skip_special_tokens=True))
print(f"\nequal to the default cache's tokens: {default_tokens.equal(paged_tokens)}")
print(f"equal after hf_kvopt.enable(model):  {default_tokens.equal(enabled_tokens)}")
print(f"default cache: {default_speed:6.1f} tokens/s, {default_bytes / 2**10:7.1f} KiB of KV")
print(f"paged cache:   {paged_speed:6.1f} tokens/s, {stats.used_bytes / 2**10:7.1f} KiB of KV", end=" ")
print(f"in {stats.used_blocks} blocks, {stats.waste_tokens} of their token slots still free")
