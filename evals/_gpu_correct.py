"""Correctness of every op at real sizes against float32, on the card, before any speed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from evals._gpu_states import make_pools, worst_error
from evals._gpu_time import Bench, graphed
from hf_kvopt.kernels import dispatch
from hf_kvopt.kernels.flash_prefill import flash_prefill_reference
from hf_kvopt.kernels.launch import target_of
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.store_kv import store_kv_reference
from hf_kvopt.quant import FORMATS, get_format

Row = dict[str, Any]


def usable_formats(bench: Bench) -> list[str]:
    """Return the formats that this card's kernels can read."""
    target = target_of(torch.empty(1, device=bench.device))
    return [
        name
        for name, fmt in FORMATS.items()
        if (fmt.min_capability or (0, 0)) <= target.capability or not target.capability[0]
    ]


def check_all(bench: Bench) -> Iterator[Row]:
    """Yield one row per check."""
    torch.manual_seed(0)
    yield from check_store(bench)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        yield from check_flash(bench, dtype)
    for name in usable_formats(bench):
        yield from check_paged(bench, name)
    if bench.device.type == "cuda":
        yield check_graph(bench)


def check_store(bench: Bench) -> Iterator[Row]:
    """Codes and scales must equal the torch reference bit for bit.

    Of int4 one vector in a thousand may have another scale: the best of several by an error whose sum is rounded in
    another order.
    """
    tokens = 16 if bench.rehearsal else 4096
    for name in usable_formats(bench):
        fmt = get_format(name)
        k = bench.rand(1, tokens, 8, 128).transpose(1, 2)
        slots = torch.randperm(tokens, device=bench.device)
        codes, scales = [], []
        for op in (dispatch.store_kv, store_kv_reference):
            shape = (tokens // 16, 16, 8)
            pool = torch.zeros(*shape, fmt.packed_dim(128), dtype=fmt.code_dtype or k.dtype, device=bench.device)
            scale = torch.zeros(*shape, *fmt.scale_shape, dtype=torch.float16, device=bench.device)
            has_scale = fmt.has_scale
            op(k, k, pool, pool.clone(), slots, scale if has_scale else None, scale.clone() if has_scale else None)
            codes.append(pool.view(torch.uint8).flatten(0, 2))
            scales.append(scale.reshape(len(codes[-1]), -1))
        differs = (scales[0] != scales[1]).any(dim=1)
        codes_differ = (codes[0] != codes[1])[~differs].float().mean().item()
        scales_differ = differs.float().mean().item()
        passed = codes_differ == 0 and scales_differ <= (1e-3 if name == "int4" else 0)
        yield {
            "check": f"store_kv {name}", "codes_that_differ": codes_differ, "scales_that_differ": scales_differ,
            "passed": passed,
        }  # fmt: skip


def check_flash(bench: Bench, dtype: torch.dtype) -> Iterator[Row]:
    """Dense attention over head sizes and patterns; peers' error is that of the same math in the same dtype."""
    length = 40 if bench.rehearsal else 2048
    window = {"window": length // 4}
    patterns: list[tuple[int, int, dict[str, Any]]] = [(d, d, {}) for d in (64, 80, 128, 256)]
    patterns += [(192, 128, {}), (128, 128, window), (64, 64, {"softcap": 20.0}), (128, 128, {"is_causal": False})]
    patterns += [(128, 128, {"starts": torch.tensor([0, length // 3], dtype=torch.int32, device=bench.device)})]
    patterns += [
        (64, 64, {"sinks": bench.rand(4, dtype=dtype)}),
        (64, 64, {"mask": bench.rand(2, 1, length, length) > -1}),
    ]
    for k_dim, v_dim, pattern in patterns:
        q = bench.rand(2, length, 4, k_dim, dtype=dtype).transpose(1, 2)
        k = bench.rand(2, length, 2, k_dim, dtype=dtype).transpose(1, 2)
        v = bench.rand(2, length, 2, v_dim, dtype=dtype).transpose(1, 2)
        out = dispatch.flash_prefill(q, k, v, Pattern(k_dim**-0.5, **pattern)).out.float()
        exact = flash_prefill_reference(q.float(), k.float(), v.float(), Pattern(k_dim**-0.5, **pattern)).out
        # Rounding of q k^T, of the probabilities and of the result, each one step of the dtype at most.
        allowed = 1e-4 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps * v.float().abs().max().item()
        error = (out - exact).abs().max().item()
        yield {
            "check": f"flash_prefill {k_dim}/{v_dim} {dtype} {sorted(pattern)}", "max_error": error, "allowed": allowed,
            "passed": error <= allowed,
        }  # fmt: skip


def check_paged(bench: Bench, format_name: str) -> Iterator[Row]:
    """Paged ops over uneven rows, one empty, NaN in all slots that no row owns."""
    lens = [0, 1, 33, 70] if bench.rehearsal else [0, 1, 4097, 16384]
    for q_len, op in ((1, dispatch.paged_decode), (5, dispatch.paged_decode), (64, dispatch.paged_prefill)):
        for dim in (128,) if bench.rehearsal else (64, 128, 256):
            for block_size in (16, 64):
                pools = make_pools(bench, lens, 2, dim, dim, format_name, block_size=block_size)
                q = bench.rand(4, q_len, 8, dim).transpose(1, 2)
                out = op(q, pools, Pattern(dim**-0.5)).out
                result = worst_error(out, q, pools, dim**-0.5, slice(0, 4))
                name = f"{op.__name__} {format_name} {dim} q{q_len} block {block_size}"
                yield {"check": name, **result, "passed": result["passed"] and bool(out.isfinite().all())}


def check_graph(bench: Bench) -> Row:
    """One CUDA graph must stay right when the lengths on the device change between replays."""
    pools = make_pools(bench, [8192] * 4, 2, 128, 128, "native")
    q = bench.rand(4, 1, 8, 128).transpose(1, 2)
    results: list[torch.Tensor] = []
    replay = graphed(lambda: results.append(dispatch.paged_decode(q, pools, Pattern(0.1)).out))
    worst = 0.0
    passed = True
    for lens in ([8192, 1, 0, 333], [5, 8191, 4096, 64], [0, 0, 0, 1]):
        pools.seq_lens.copy_(torch.tensor(lens))
        replay()
        result = worst_error(results[-1], q, pools, 0.1, slice(0, 4))
        worst, passed = max(worst, result["max_error"]), passed and bool(result["passed"])
    return {
        "check": "paged_decode in a CUDA graph, lengths changed between replays",
        "max_error": worst,
        "passed": passed,
    }
