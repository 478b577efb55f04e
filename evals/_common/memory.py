"""Memory of a cache, and of a run, in bytes."""

import resource
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class KVBytes(NamedTuple):
    """Bytes that hold tokens, and all bytes that the cache reserves."""

    used: int = 0
    reserved: int = 0


def kv_bytes(cache: Cache) -> KVBytes:
    """Count a cache's bytes: from its `stats()` if it has them, else from its layers' tensors."""
    if hasattr(cache, "stats"):
        stats = cache.stats()
        return KVBytes(stats.used_bytes, stats.reserved_bytes)
    used = reserved = 0
    for layer in cache.layers:
        if getattr(layer, "_quantized_keys", None) is not None:
            # transformers keeps the quantized part beside an unquantized rest, without free space.
            parts = ("_quantized_keys", "_quantized_values", "keys", "values")
            size = sum(_tensor_bytes(getattr(layer, part)) for part in parts)
            used, reserved = used + size, reserved + size
            continue
        if not isinstance(layer, CacheLayerMixin) or layer.keys is None or layer.values is None:
            continue
        size = sum(t.numel() * t.element_size() for t in (layer.keys, layer.values))
        length = layer.keys.shape[-2]
        reserved += size
        used += size * min(int(layer.get_seq_length()), length) // length if length else 0
    return KVBytes(used, reserved)


def _tensor_bytes(value: object) -> int:
    """Count the bytes of a tensor, of the parts of a tensor subclass, or of all tensors in a collection."""
    if isinstance(value, torch.Tensor):
        if type(value) is not torch.Tensor and hasattr(value, "__tensor_flatten__"):
            return sum(_tensor_bytes(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        return value.numel() * value.element_size()
    if isinstance(value, Mapping):
        return _tensor_bytes(list(value.values()))
    return sum(map(_tensor_bytes, value)) if isinstance(value, (list, tuple)) else 0


def peak_bytes(device: torch.device, body: Callable[[], object]) -> int:
    """Run `body` and return the peak of the memory it held beyond what was held before.

    On a GPU: bytes that torch allocated. On a CPU: growth of the process's resident set, which is correct only in a
    fresh process, since freed memory stays resident and is reused without growth.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        body()
        return torch.cuda.max_memory_allocated(device) - before
    has_high_water = _reset_high_water()
    before = _status_bytes("VmRSS") if has_high_water else _max_rss_bytes()
    body()
    return max(0, (_status_bytes("VmHWM") if has_high_water else _max_rss_bytes()) - before)


def resident_bytes(device: torch.device) -> int:
    """Return what is held now: bytes that torch allocated on a GPU, else the resident set of the process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _status_bytes("VmRSS") if STATUS.exists() else _max_rss_bytes()


def _reset_high_water() -> bool:
    """Reset Linux's VmHWM to the current resident set; return False if the system has none."""
    try:
        CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status_bytes(key: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def _max_rss_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
