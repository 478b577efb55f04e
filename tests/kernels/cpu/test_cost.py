"""What the torch attention path allocates: no [q_len, kv_len] tensor for plain patterns, no repeated KV head.

Seen by the storages that torch operations make, views left out. A tile is [heads, 16 queries, kv_len] here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_kvopt.kernels.cpu import dense as cpu
from hf_kvopt.kernels.cpu.dense import attend
from hf_kvopt.kernels.pattern import Pattern

HEADS, KV_HEADS, DIM, KV_LEN = 4, 2, 8, 384
TILE_ROWS = 16
EXTRAS = {
    "plain": {},
    "soft capping": {"softcap": 2.0},
    "sinks": {"sinks": torch.zeros(HEADS)},
}
PATTERNS = {
    "causal": {"is_causal": True},
    "full": {"is_causal": False},
    "window": {"is_causal": True, "window": 50},
    "left padding": {"is_causal": True, "starts": [0, 3]},
    "window and left padding": {"is_causal": True, "window": 50, "starts": [0, 3]},
    "keys masked": {"is_causal": False, "mask": torch.ones(2, 1, 1, KV_LEN, dtype=torch.bool)},
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class _Allocations(TorchDispatchMode):
    """Elements of every storage that an operation made, largest first, with the operation's name."""

    def __init__(self, known: list[torch.Tensor]) -> None:
        super().__init__()
        self.known = {x.untyped_storage().data_ptr() for x in known}
        self.made: list[tuple[int, str]] = []
        self.kept: list[Any] = []  # an address that is used again would hide an allocation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in (x for x in tree_leaves(out) if isinstance(x, torch.Tensor)):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.known:
                self.known.add(storage.data_ptr())
                self.kept.append(storage)
                self.made.append((storage.nbytes() // tensor.element_size(), str(func)))
        return out


@contextmanager
def allocations(*known: torch.Tensor) -> Iterator[list[tuple[int, str]]]:
    with torch.no_grad(), _Allocations(list(known)) as mode:
        yield mode.made
    mode.made.sort(reverse=True)


def make(q_len: int, batch: int, v_dim: int = DIM) -> tuple[torch.Tensor, ...]:
    shapes = (q_len, HEADS, DIM), (KV_LEN, KV_HEADS, DIM), (KV_LEN, KV_HEADS, v_dim)
    return tuple(torch.randn(batch, *shape).transpose(1, 2) for shape in shapes)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("q_len", [KV_LEN, KV_LEN // 2], ids=["prefill", "continued prefill"])
@pytest.mark.parametrize("v_dim", [DIM, DIM // 2], ids=["like head sizes", "unlike head sizes"])
def test_a_prefill_allocates_no_more_than_tiles(v_dim, q_len, options, extras, monkeypatch):
    monkeypatch.setattr(cpu, "_TILE_ROWS", TILE_ROWS)
    q, k, v = make(q_len, batch=2, v_dim=v_dim)
    with allocations(q, k, v) as made:
        attend(q, k, v, Pattern(1.0, **options, **extras))
    # Scores of a tile and as much again for the sink's column; the output is smaller.
    assert made[0][0] <= 2 * HEADS * TILE_ROWS * (KV_LEN + 1), made[:3]
    assert made[0][0] < q_len * KV_LEN, made[:3]


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("v_dim", [DIM, DIM // 2], ids=["like head sizes", "unlike head sizes"])
def test_a_decode_step_copies_neither_keys_nor_values(v_dim, options, extras):
    q, k, v = make(1, batch=2, v_dim=v_dim)
    with allocations(q, k, v) as made:
        attend(q, k, v, Pattern(1.0, **options, **extras))
    # The largest thing is the scores: a key's worth is num_heads elements, against KV_HEADS * DIM of a copy.
    assert made[0][0] <= 2 * HEADS * (KV_LEN + 1), made[:3]


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_a_prefill_never_repeats_the_keys_of_a_group(extras, monkeypatch):
    monkeypatch.setattr(cpu, "_TILE_ROWS", 16)
    # Three queries against many keys, so that a repeated head would be the largest tensor by far.
    q, k, v = make(3, batch=1)
    with allocations(q, k, v) as made:
        attend(q, k, v, Pattern(1.0, **extras))
    assert made[0][0] <= 3 * HEADS * (KV_LEN + 1), made[:3]
    assert made[0][0] < HEADS * KV_LEN * DIM, made[:3]


@pytest.mark.parametrize("starts", [None, [0, 3]], ids=["no padding", "left padding"])
def test_a_plain_causal_prefill_makes_no_mask_at_all(starts):
    q, k, v = make(KV_LEN, batch=2)
    with allocations(q, k, v) as made:
        attend(q, k, v, Pattern(1.0, starts=starts))
    assert not [name for _, name in made if name.startswith(("aten.arange", "aten.le"))]
