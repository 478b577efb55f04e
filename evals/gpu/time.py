"""Timing on a GPU: CUDA events, a flushed L2 between repeats, and the limits of a copy and a matrix product."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Bench(NamedTuple):
    """Device and settings of a run; a `rehearsal` is a CPU with tiny sizes, whose times are meaningless."""

    device: torch.device
    repeats: int
    deadline: float  # time.monotonic() after which no new measurement starts
    rehearsal: bool

    @property
    def is_late(self) -> bool:
        """Return whether the time budget is used up."""
        return time.monotonic() > self.deadline

    def rand(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Return normal noise on the device."""
        return torch.randn(shape, dtype=dtype, device=self.device)

    def free_bytes(self) -> int:
        """Return the bytes that can still be allocated, after freeing cached memory."""
        if self.device.type != "cuda":
            return 2**31
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(self.device)[0]


def graphed(call: Callable[[], Any]) -> Callable[[], Any]:
    """Return the call as a CUDA graph replay, so that only the device's work is timed."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def median_ms(bench: Bench, call: Callable[[], Any], graph: bool = False) -> float:
    """Return the median milliseconds of a call, each repeat with a cold L2."""
    if bench.device.type != "cuda":
        started = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - started)
    call()
    if graph:
        call = graphed(call)
    # Larger than any current L2; zeroing it also gives the host time to queue what follows.
    flush = torch.empty(256 * 2**20, dtype=torch.int8, device=bench.device)
    for _ in range(3):
        call()
    events = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(bench.repeats)
    ]
    for start, end in events:
        flush.zero_()
        start.record()
        call()
        end.record()
    torch.cuda.synchronize(bench.device)
    return statistics.median(start.elapsed_time(end) for start, end in events)


def card_limits(bench: Bench) -> dict[str, float]:
    """Return the limits of this GPU in this run: copy bandwidth (bytes read and written) and bf16 product rate."""
    num_bytes, side = (2**31, 8192) if bench.device.type == "cuda" else (2**20, 64)
    source = torch.empty(num_bytes, dtype=torch.int8, device=bench.device)
    target = torch.empty_like(source)
    copy_ms = median_ms(bench, lambda: target.copy_(source))
    a, b = bench.rand(side, side), bench.rand(side, side)
    product_ms = median_ms(bench, lambda: a @ b)
    return {"copy_gb_s": 2 * num_bytes / copy_ms / 1e6, "matmul_tflop_s": 2 * side**3 / product_ms / 1e9}


def attempt(bench: Bench, call: Callable[[], Any]) -> dict[str, Any]:
    """Return {"ms": ...} of a CUDA graph's replay, or of plain calls if no graph can hold the call.

    For a call that this GPU or version lacks, return {"unavailable": reason}.
    """
    try:
        call()
    except Exception as error:  # a peer may fail in any way; the row states how
        return {"unavailable": _reason(error)}
    try:
        return {"ms": median_ms(bench, call, graph=True)}
    except Exception as error:
        try:
            return {"ms": median_ms(bench, call), "no_graph": _reason(error)}
        except Exception as second:
            return {"unavailable": _reason(second)}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
