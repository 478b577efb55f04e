"""Rows in several pieces of memory give what one attention over each whole row gives."""

import pytest
import torch

from hf_kvopt.kernels.cpu import pieces as cpu_pieces
from hf_kvopt.kernels.cpu.dense import attend
from hf_kvopt.kernels.cpu.pieces import attend_pieces
from hf_kvopt.kernels.pattern import Pattern

DIM, SCALE = 16, 0.3
ROWS = {
    "one piece": [[5], [9]],
    "shared beginning": [["a", 4], ["a", 7], ["a", 1]],
    "two beginnings": [["a", 3], ["b", 6], ["a", 2], ["b", "c", 5]],
    "shared by all but one": [["a", 6], ["a", 2], [11]],
    "many short pieces": [[1, 2, 1, 3, 1], ["a", 1, 1, 1], [2, 2, 2, 2]],
    "as long as its queries": [["a", 3], [4], ["b", 2]],
}
SHARED = {"a": 37, "b": 16, "c": 5}


def make_rows(lengths, num_kv_heads=2, dtype=torch.float32):
    draw = torch.Generator().manual_seed(1)

    def states(length):
        return 2 * torch.randn(num_kv_heads, length, DIM, generator=draw).to(dtype)

    shared = {name: (states(n), states(n)) for name, n in SHARED.items()}
    pairs = [[shared[n] if isinstance(n, str) else (states(n), states(n)) for n in row] for row in lengths]
    return [[k for k, _ in row] for row in pairs], [[v for _, v in row] for row in pairs]


def one_by_one(q, keys, values):
    whole = (
        attend(q[i : i + 1], torch.cat(k, 1)[None], torch.cat(v, 1)[None], Pattern(SCALE))
        for i, (k, v) in enumerate(zip(keys, values, strict=True))
    )
    return torch.cat(list(whole))


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (4, 1)], ids=["multi-head", "grouped", "multi-query"])
@pytest.mark.parametrize("q_len", [1, 2, 4, 5])
@pytest.mark.parametrize("lengths", ROWS.values(), ids=ROWS)
def test_pieces_give_what_whole_rows_give(lengths, q_len, heads):
    keys, values = make_rows(lengths, heads[1])
    shortest = min(sum(piece.shape[1] for piece in row) for row in keys)
    q_len = min(q_len, shortest)
    q = torch.randn(len(lengths), heads[0], q_len, DIM, generator=torch.Generator().manual_seed(q_len))
    out = attend_pieces(q, keys, values, SCALE)
    assert out.shape == (len(lengths), q_len, heads[0], DIM)
    assert out.is_contiguous()
    assert (out - one_by_one(q, keys, values)).abs().max() <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_as_near_as_sdpa(dtype):
    keys, values = make_rows(ROWS["two beginnings"], dtype=dtype)
    q = torch.randn(4, 4, 1, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = attend_pieces(q, keys, values, SCALE)
    exact = one_by_one(q.float(), *([[x.float() for x in row] for row in rows] for rows in (keys, values)))
    assert out.dtype == dtype
    nearest = (one_by_one(q, keys, values).float() - exact).abs().max()
    assert (out.float() - exact).abs().max() <= 3 * nearest + 1e-5


def test_a_piece_that_rows_share_is_read_once(monkeypatch):
    calls = []
    flash = cpu_pieces._flash
    monkeypatch.setattr(cpu_pieces, "_flash", lambda q, *args, **kw: calls.append(q.shape[2]) or flash(q, *args, **kw))
    keys, values = make_rows([["a", 4], ["a", 7], ["a", 1]])
    attend_pieces(torch.randn(3, 4, 1, DIM), keys, values, SCALE)
    assert sorted(calls) == [2, 2, 2, 6]  # one query and two heads a KV head: three rows at once, then each alone
