"""One long row decoded as two matrix products gives what SDPA gives."""

import pytest
import torch

from hf_kvopt.kernels.cpu import dense as cpu
from hf_kvopt.kernels.cpu.dense import attend
from hf_kvopt.kernels.pattern import Pattern


@pytest.fixture(autouse=True)
def _rows_of_sixteen_are_long(monkeypatch):
    monkeypatch.setattr(cpu, "_LONG_ROW", 16)


def make_row(kv_len, heads=(4, 2), dtype=torch.float32, batch=1):
    draw = torch.Generator().manual_seed(kv_len)
    q = torch.randn(batch, 1, heads[0], 16, generator=draw).transpose(1, 2)
    k, v = (3 * torch.randn(batch, kv_len, heads[1], 16, generator=draw).transpose(1, 2) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def in_one(q, k, v, scale, compute=torch.float64):
    k, v = (x.to(compute).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return (torch.softmax((q.to(compute) @ k.transpose(2, 3)) * scale, dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["multi-head", "grouped", "multi-query"])
def test_long_rows_of_every_length_agree(heads):
    for kv_len in range(1, 40):
        q, k, v = make_row(kv_len, heads)
        out = attend(q, k, v, Pattern(0.5))
        assert (out - in_one(q, k, v, 0.5)).abs().max() <= 1e-5, kv_len


def test_a_window_narrows_a_long_row():
    q, k, v = make_row(39)
    out = attend(q, k, v, Pattern(0.5, window=21))
    assert (out - in_one(q, k[:, :, 18:], v[:, :, 18:], 0.5)).abs().max() <= 1e-5


def test_a_view_of_a_pool_agrees():
    pools = torch.full((2, 2, 64, 16), torch.nan)
    q, k, v = make_row(37)
    pools[0, :, 16:53], pools[1, :, 16:53] = k[0], v[0]
    k, v = (pool[None, :, 16:53] for pool in pools)
    out = attend(q, k, v, Pattern(0.5))
    assert (out - in_one(q, k, v, 0.5)).abs().max() <= 1e-5


def test_only_a_long_row_alone_in_float32_takes_two_products(monkeypatch):
    taken = []
    long = cpu._decode_long
    monkeypatch.setattr(cpu, "_decode_long", lambda *args: taken.append(1) or long(*args))
    for kv_len in range(1, 40):
        taken.clear()
        attend(*make_row(kv_len), Pattern(0.5))
        assert bool(taken) == (kv_len >= 16)
    taken.clear()
    mask = torch.ones(1, 1, 1, 39, dtype=torch.bool)
    for options in ({"mask": mask}, {"softcap": 2.0}, {"sinks": torch.zeros(4)}):
        attend(*make_row(39), Pattern(0.5, **options))
    attend(*make_row(39), Pattern(0.5), dropout=0.1)
    attend(*make_row(39, batch=2), Pattern(0.5))
    attend(*make_row(39, dtype=torch.bfloat16), Pattern(0.5))
    assert not taken
