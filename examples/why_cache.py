"""Decoding naively and with a KV cache, and softmax over tiles of keys: equal results, counted operations.

Run `python examples/why_cache.py` (the bundled model, no network), or with `--model HUB_ID`. `python -m evals.why`
measures and draws these figures.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from hf_kvopt import CACHE_KEYWORD

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default=str(Path(__file__).parents[1] / "evals/reference_model/model"))
parser.add_argument("--new-tokens", type=int, default=100)
args = parser.parse_args()

counted = []  # (queries, keys) of every attention call: one for each layer and step


def counting_attention(module, query, key, *args, **kwargs):  # query [batch, heads, q_len, head_dim]
    """Compute sdpa, and count its queries and keys."""
    counted.append((query.shape[2], key.shape[2]))
    return sdpa_attention_forward(module, query, key, *args, **kwargs)


AttentionInterface.register("counting", counting_attention)
model = AutoModelForCausalLM.from_pretrained(args.model, attn_implementation="counting", dtype=torch.float32)
bos = AutoTokenizer.from_pretrained(args.model).bos_token_id or 0
num_layers = model.config.get_text_config().num_hidden_layers


@torch.no_grad()
def decode(cache: DynamicCache | None) -> torch.Tensor:
    """Generate `--new-tokens` tokens greedily after a start token, and print counts and time."""
    text = torch.tensor([[bos]])
    counted.clear()
    begin = time.perf_counter()
    for _ in range(args.new_tokens):
        fed = text if cache is None else text[:, -1:]  # a cache holds the rest
        logits = model(fed, **{CACHE_KEYWORD: cache}, use_cache=cache is not None).logits
        text = torch.cat([text, logits[:, -1:].argmax(-1)], dim=1)
    seconds = time.perf_counter() - begin
    queries = sum(q for q, _ in counted) // num_layers
    scores = sum(q * k - q * (q - 1) // 2 for q, k in counted) // num_layers  # a query sees itself and what is before
    print(f"  {'naive' if cache is None else 'cached':7}{queries:>9,} queries{scores:>11,} scores{seconds:8.2f} s")
    return text


print(f"{args.new_tokens} tokens, attention operations of one layer:")
naive, cached = decode(None), decode(DynamicCache(config=model.config))
print(f"  the same tokens: {naive.equal(cached)}")


def tiled_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tile: int) -> torch.Tensor:
    """Compute softmax(q k^T / sqrt(d)) v over `tile` keys at a time; all tensors are [length, d]."""
    m = torch.full((len(q), 1), -torch.inf)  # the largest score so far
    total, o = torch.zeros(len(q), 1), torch.zeros_like(v)  # Σ exp(s - m) and Σ exp(s - m) v so far
    for start in range(0, len(k), tile):
        s = q @ k[start : start + tile].T / q.shape[1] ** 0.5  # the only scores that exist
        new_m = torch.maximum(m, s.amax(dim=1, keepdim=True))
        p, shrink = torch.exp(s - new_m), torch.exp(m - new_m)  # rescales sums under the old maximum
        total, o, m = total * shrink + p.sum(1, keepdim=True), o * shrink + p @ v[start : start + tile], new_m
    return o / total


generator = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2048, 64, generator=generator) for _ in range(3))
want = torch.softmax(q @ k.T / 64**0.5, dim=-1) @ v
print("2,048 queries over 2,048 keys, softmax over a tile of them at a time:")
for tile in (16, 64, 256, 1024, 2048):
    error = float((tiled_attention(q, k, v, tile) - want).abs().max())
    print(f"  tile {tile:5,}: {len(q) * tile * 4 / 2**20:7.3f} MiB of scores, {error:.0e} off the one-shot result")
