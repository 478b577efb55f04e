"""Cost of decoding without a KV cache, and of softmax over tiles: `python -m evals.why`.

    naive    every step feeds the whole text again     n (n + 1) / 2 queries a layer, n (n + 1) (n + 2) / 6 scores
    cached   every step feeds one token                n queries a layer, n (n + 1) / 2 scores
    tiled    softmax(q k) v over one tile of keys at a time: m, l and o are rescaled where a new maximum appears,
                 m' = max(m, max s)   l' = l e^(m - m') + Σ e^(s - m')   o' = o e^(m - m') + Σ e^(s - m') v
             so only the scores of one tile exist at a time (arXiv:1805.02867, arXiv:2205.14135)

Queries, and the scores of each with itself and the tokens before it, are counted where attention is called, on the
bundled model; both ways must give the same tokens.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor
from transformers import AttentionInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from evals._common.cli import Parser, add_output_argument, at_least
from evals._common.models import Subject, add_model_arguments, check_length, load_subject
from evals._common.rows import append_rows, provenance
from evals._common.screen import megabytes, show_table
from hf_kvopt import CACHE_KEYWORD

COUNTED = "counted_sdpa"


class Decoding(NamedTuple):
    """One way to decode: tokens, seconds of each step, and the inputs of each layer's attention."""

    tokens: list[int]
    step_s: list[float]
    queries: list[int]  # of one layer, by step
    scores: list[int]  # of those queries with the keys that they see


class Tiling(NamedTuple):
    """Attention over tiles of one width: the peak of score bytes, and the error against the one-shot result."""

    tile: int
    score_bytes: int
    max_error: float
    time_ms: float


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.why", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    parser.add_argument("--new-tokens", type=at_least(2), default=100, help="%(default)s")
    parser.add_argument("--keys", type=at_least(16), default=2048, help="of the tiled softmax (%(default)s)")
    parser.add_argument("--plot", type=Path, help="picture to write (beside --out)")
    add_output_argument(parser, "why.json")
    return parser


def run(args: argparse.Namespace) -> int:
    """Decode both ways, tile, show, write; return 1 if the tokens or the softmax differ."""
    subject = load_subject(args)
    check_length(subject, args.new_tokens + 1)
    AttentionInterface.register(COUNTED, _counted)
    subject.model.set_attn_implementation(COUNTED)
    decode(subject, 4, is_cached=True)  # warm-up
    naive, cached = (decode(subject, args.new_tokens, is_cached) for is_cached in (False, True))
    tilings = [attend(args.keys, tile) for tile in _tiles(args.keys)]
    is_right = naive.tokens == cached.tokens and all(tiling.max_error < 1e-5 for tiling in tilings)
    _show(naive, cached, tilings)
    _plot(args.plot or args.out.with_suffix(".png"), naive, cached, tilings)
    append_rows(args.out, _rows(args, subject, naive, cached, tilings))
    return int(not is_right)


@torch.no_grad()
def decode(subject: Subject, num_tokens: int, is_cached: bool) -> Decoding:
    """Generate greedily from one start token, feeding the whole text at every step, or only the newest token."""
    model = subject.model
    start = model.config.bos_token_id
    text = torch.tensor([[start if start is not None else 0]], device=model.device)
    cache = DynamicCache(config=model.config) if is_cached else None
    done = Decoding([], [], [], [])
    for _ in range(num_tokens):
        _COUNTS.clear()
        begin = time.perf_counter()
        fed = text[:, -1:] if is_cached else text
        logits = model(input_ids=fed, **{CACHE_KEYWORD: cache}, use_cache=is_cached).logits[0, -1]
        token = int(logits.argmax())
        done.step_s.append(time.perf_counter() - begin)
        done.tokens.append(token)
        queries, scores = (sum(counts) // len(_COUNTS) for counts in zip(*_COUNTS, strict=True))
        done.queries.append(queries)
        done.scores.append(scores)
        text = torch.cat([text, torch.tensor([[token]], device=model.device)], dim=1)
    return done


_COUNTS: list[tuple[int, int]] = []  # (queries, scores) of each attention call in the current step, one for each layer


def _counted(module: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
    num_queries, num_keys = query.shape[2], key.shape[2]
    _COUNTS.append((num_queries, num_queries * num_keys - num_queries * (num_queries - 1) // 2))
    return sdpa_attention_forward(module, query, key, *args, **kwargs)


def attend(num_keys: int, tile: int, dim: int = 64) -> Tiling:
    """Attend from `num_keys` queries to as many keys, tile by tile, and compare with one softmax in float64."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(num_keys, dim, generator=generator) for _ in range(3))
    want = torch.softmax(q.double() @ k.double().T / dim**0.5, dim=-1) @ v.double()
    begin = time.perf_counter()
    got, score_bytes = tiled_attention(q, k, v, tile)
    return Tiling(tile, score_bytes, float((got - want).abs().max()), 1e3 * (time.perf_counter() - begin))


def tiled_attention(
    q: Tensor,  # [num_queries, dim]
    k: Tensor,  # [num_keys, dim]
    v: Tensor,  # [num_keys, dim]
    tile: int,
) -> tuple[Tensor, int]:  # [num_queries, dim], and the peak of score bytes
    """Compute attention with a softmax over `tile` keys at a time."""
    m = torch.full((len(q), 1), -torch.inf)  # the largest score so far
    total = torch.zeros(len(q), 1)  # the sum of exponentials so far
    o = torch.zeros_like(q)  # the weighted sum so far
    most = 0
    for start in range(0, len(k), tile):
        s = q @ k[start : start + tile].T / q.shape[1] ** 0.5
        most = max(most, s.nbytes)
        new_m = torch.maximum(m, s.amax(dim=1, keepdim=True))
        p, shrink = torch.exp(s - new_m), torch.exp(m - new_m)
        total = total * shrink + p.sum(dim=1, keepdim=True)
        o = o * shrink + p @ v[start : start + tile]
        m = new_m
    return o / total, most


def _tiles(num_keys: int) -> list[int]:
    """Return powers of four from 16 on, and all keys at once."""
    tiles = [16 * 4**i for i in range(10) if 16 * 4**i < num_keys]
    return [*tiles, num_keys]


def _show(naive: Decoding, cached: Decoding, tilings: Sequence[Tiling]) -> None:
    lines = []
    for name, way in (("naive", naive), ("cached", cached)):
        last = way.step_s[-1] * 1e3
        counts = [f"{sum(way.queries):,}", f"{sum(way.scores):,}"]
        lines.append([name, *counts, f"{sum(way.step_s):.2f} s", f"{last:.1f} ms"])
    parted = "the same tokens" if naive.tokens == cached.tokens else "THE TOKENS DIFFER"
    show_table(
        f"{len(naive.tokens)} tokens, {parted}", ["way", "queries a layer", "scores", "time", "last step"], lines
    )
    columns = ["tile", "scores alive", "time ms", "error"]
    rows = [[t.tile, megabytes(t.score_bytes), f"{t.time_ms:.1f}", f"{t.max_error:.1e}"] for t in tilings]
    show_table("softmax over tiles of keys, the last one all at once", columns, rows)


def _plot(path: Path, naive: Decoding, cached: Decoding, tilings: Sequence[Tiling]) -> None:
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    work, clock, tiles = figure.subplots(1, 3)
    steps = range(1, len(naive.tokens) + 1)
    for name, way, color in (("naive", naive, "tab:red"), ("cached", cached, "tab:blue")):
        totals = torch.tensor(way.queries).cumsum(0).tolist()
        work.plot(steps, totals, color=color)
        work.annotate(f"{name}: {totals[-1]:,}", (steps[-1], totals[-1]), ha="right", va="bottom", color=color)
        clock.plot(steps, [1e3 * s for s in way.step_s], color=color, label=name)
    work.set(title="queries a layer, in all", xlabel="token", ylim=(0, 1.12 * sum(naive.queries)))
    clock.set(title="time of a step, ms", xlabel="token", ylim=(0, None))
    clock.legend(frameon=False)
    tiles.plot([t.tile for t in tilings], [t.score_bytes / 2**20 for t in tilings], "o-", color="tab:green")
    tiles.set(title="scores alive at once, MiB", xlabel="keys a tile", xscale="log", yscale="log")
    tiles.set_xticks([t.tile for t in tilings[:-1]], [f"{t.tile:,}" for t in tilings[:-1]])
    tiles.minorticks_off()
    for axes in (work, clock, tiles):
        axes.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _rows(
    args: argparse.Namespace, subject: Subject, naive: Decoding, cached: Decoding, tilings: Sequence[Tiling]
) -> list[dict[str, Any]]:
    facts = provenance(subject.model.device)
    decoding = {
        "eval": "why",
        "what": "decoding",
        "model": subject.name,
        "new_tokens": args.new_tokens,
        "is_equal": naive.tokens == cached.tokens,
        "naive_queries": sum(naive.queries),
        "cached_queries": sum(cached.queries),
        "naive_scores": sum(naive.scores),
        "cached_scores": sum(cached.scores),
        "naive_s": sum(naive.step_s),
        "cached_s": sum(cached.step_s),
        "speed_up": sum(naive.step_s) / sum(cached.step_s),
    }
    tiles = [{"eval": "why", "what": "tiling", "keys": args.keys, **tiling._asdict()} for tiling in tilings]
    return [{**row, **facts} for row in (decoding, *tiles)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
