"""Stores with tiers, emptied on the device so that what they know must come from below."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_kvopt import KV_FORMATS, PrefixStore
from tests.helpers import tiny_model
from tests.prefix.prefixes import batch, counted, text, turn

LONG = text(200, seed=7)
SEALED = next(name for name, format in KV_FORMATS.items() if format.sealed is not None)
FORMATS = tuple(dict.fromkeys(("native", "int8", "int4", SEALED, "fp8_e5m2")))


def evict_all(store: PrefixStore) -> None:
    """Wait for the copies, and let go of all that lies on the device; not a byte of it stays to be found by chance."""
    store.flush()
    with store.lock:
        store.index.evict(10_000)
    assert store.stats().num_blocks == 0
    store.check_integrity()
    for pool in store.blocks.pools.values():
        for plane in pool.planes:
            for tensor in plane.tensors:
                tensor.view(torch.uint8).fill_(1) if tensor.stride(-1) == 1 else tensor.fill_(1)


def known(store: PrefixStore, model: PreTrainedModel, tokens: list[int] = LONG) -> tuple[Tensor, int]:
    """Generate behind a text; returns the output, and how many positions its first forward computed."""
    with counted() as forwards:
        output = turn(store, model, batch(tokens))
    return output, forwards[0]


def fresh(kind: str, tokens: list[int] = LONG, **options: Any) -> Tensor:
    """Generate behind a text with a store that knows nothing."""
    model = tiny_model(kind)
    return turn(PrefixStore(model, **options), model, batch(tokens))


def on_disk(folder: Path) -> list[Path]:
    """Return all files below a folder."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
