"""Clock of the evals: CUDA events on a GPU, `perf_counter` elsewhere."""

import time
from collections.abc import Callable

import torch


class Clock:
    """Times bodies on one device; empties the L2 cache of a GPU between repeats."""

    def __init__(self, device: torch.device) -> None:
        self.is_cuda = device.type == "cuda"
        self.device = device
        # Twice the largest L2 of current GPUs; writing it evicts everything else.
        self._flush = torch.empty(256 << 20, dtype=torch.int8, device=device) if self.is_cuda else None

    def settle(self) -> None:
        """Bring a GPU to the same state before each timed body: idle, with nothing useful in its L2 cache."""
        if self._flush is not None:
            self._flush.zero_()
            torch.cuda.synchronize(self.device)

    def time_ms(self, body: Callable[[], object]) -> float:
        """Run `body` once and return its time in milliseconds."""
        if not self.is_cuda:
            start = time.perf_counter()
            body()
            return (time.perf_counter() - start) * 1e3
        with torch.cuda.device(self.device):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            body()
            last.record()
            last.synchronize()
            return first.elapsed_time(last)
