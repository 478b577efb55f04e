"""One long row decoded in pieces gives what it gives in one."""

import pytest
import torch

from hf_kvopt.kernels import cpu
from hf_kvopt.kernels.cpu import attend


@pytest.fixture(autouse=True)
def _pieces_of_eight(monkeypatch):
    monkeypatch.setattr(cpu, "_SPLIT_TOKENS", 8)


def make_row(kv_len, heads=(4, 2), dtype=torch.float32, batch=1):
    draw = torch.Generator().manual_seed(kv_len)
    q = torch.randn(batch, 1, heads[0], 16, generator=draw).transpose(1, 2)
    k, v = (3 * torch.randn(batch, kv_len, heads[1], 16, generator=draw).transpose(1, 2) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def in_one(q, k, v, scale, compute=torch.float64):
    k, v = (x.to(compute).repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    return (torch.softmax((q.to(compute) @ k.transpose(2, 3)) * scale, dim=-1) @ v).transpose(1, 2)


@pytest.mark.parametrize("num_splits", [2, 3, 4, 5])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["multi-head", "grouped", "multi-query"])
def test_every_remainder_of_the_length_agrees(heads, num_splits):
    for kv_len in range(num_splits, 6 * num_splits + 1):
        q, k, v = make_row(kv_len, heads)
        folded = q.reshape(1, heads[1], heads[0] // heads[1], 16)
        out = cpu._decode_split(folded, k, v, 0.5, num_splits).reshape(1, 1, heads[0], 16)
        assert (out - in_one(q, k, v, 0.5)).abs().max() <= 1e-5, kv_len


def test_pieces_of_a_view_of_a_pool_agree():
    pools = torch.full((2, 2, 64, 16), torch.nan)
    q, k, v = make_row(37)
    pools[0, :, 16:53], pools[1, :, 16:53] = k[0], v[0]
    k, v = (pool[None, :, 16:53] for pool in pools)
    out = cpu._decode_split(q.reshape(1, 2, 2, 16), k, v, 0.5, 4).reshape(1, 1, 4, 16)
    assert (out - in_one(q, k, v, 0.5)).abs().max() <= 1e-5


def test_pieces_in_bfloat16_are_as_close_as_plain_torch():
    q, k, v = make_row(67, dtype=torch.bfloat16)
    out = cpu._decode_split(q.reshape(1, 2, 2, 16), k, v, 0.5, 4).reshape(1, 1, 4, 16)
    want, honest = in_one(q, k, v, 0.5, torch.float32), in_one(q, k, v, 0.5, torch.bfloat16)
    assert (out - want).abs().max() <= 2 * (honest - want).abs().max() + 1e-5


def test_attention_takes_pieces_for_a_long_row_alone(monkeypatch):
    taken = []
    split = cpu._decode_split
    monkeypatch.setattr(cpu, "_decode_split", lambda *args: taken.append(args[-1]) or split(*args))
    for kv_len in range(1, 40):
        taken.clear()
        q, k, v = make_row(kv_len)
        out = attend(q, k, v, scale=0.5, is_causal=True)
        assert (out - in_one(q, k, v, 0.5)).abs().max() <= 1e-5
        assert taken == ([min(kv_len // 8, 2 * torch.get_num_threads())] if kv_len >= 16 else [])
    taken.clear()
    mask = torch.ones(1, 1, 1, 39, dtype=torch.bool)
    for options in ({"mask": mask}, {"softcap": 2.0}, {"sinks": torch.zeros(4)}, {"dropout": 0.1}):
        attend(q, k, v, scale=0.5, is_causal=True, **options)
    attend(*make_row(39, batch=2), scale=0.5, is_causal=True)
    assert not taken
