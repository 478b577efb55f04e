"""Compiled CPU attention over blocks against softmax written out in float64, over pools full of NaN elsewhere."""

import os
import threading
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_kvopt.kernels.cpu import paged_attention as cpu_jit
from hf_kvopt.kernels.cpu.address import address_of
from hf_kvopt.kernels.cpu.jit.spec import CHUNK, TILE
from hf_kvopt.kernels.cpu.paged_attention import can_attend
from hf_kvopt.kernels.cpu.program import can_compile
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import visible_pairs
from hf_kvopt.quant import Quantized, dequantize, get_format, quantize
from tests.helpers import assert_in_a_forked_child, join_while_working

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")


class Rows(NamedTuple):
    """A batch in a pool of which every slot outside of the rows holds NaN."""

    q: Tensor  # [batch, num_heads, q_len, head_dim]
    k: Tensor  # [num_blocks, block_size, num_kv_heads, head_dim]
    v: Tensor
    block_table: Tensor
    seq_lens: Tensor

    def dense(self, pool: Tensor) -> Tensor:
        """[batch, num_kv_heads, longest, dim], zeros behind the shorter rows."""
        longest, size = int(self.seq_lens.max()), pool.shape[1]
        token = torch.arange(longest)
        rows = pool[self.block_table.long()[:, token // size], token % size].transpose(1, 2)
        return rows.masked_fill((token >= self.seq_lens[:, None])[:, None, :, None], 0.0)


def make_rows(lengths=(37,), heads=(4, 2), sizes=(32, 32), q_len=1, block_size=16, dtype=torch.float32, seed=0) -> Rows:
    draw = torch.Generator().manual_seed(seed + sum(lengths))
    needed = [-(-length // block_size) for length in lengths]
    order = (torch.randperm(sum(needed) + 1, generator=draw) + 1).tolist()
    table = torch.full((len(lengths), max(needed)), -1, dtype=torch.int32)
    pools = [torch.full((heads[1], sum(needed) + 3, block_size, dim), torch.nan) for dim in sizes]
    for row, (length, count) in enumerate(zip(lengths, needed, strict=True)):
        for column in range(count):
            block, used = order.pop(), min(block_size, length - column * block_size)
            table[row, column] = block
            for pool in pools:
                pool[:, block, :used] = torch.randn(heads[1], used, pool.shape[-1], generator=draw)
    k, v = (pool.to(dtype).permute(1, 2, 0, 3) for pool in pools)
    q = 2 * torch.randn(len(lengths), q_len, heads[0], sizes[0], generator=draw).transpose(1, 2)
    return Rows(q.to(dtype), k, v, table, torch.tensor(lengths, dtype=torch.int32))


def attend_blocks(
    q, k, v, table, lens, k_scale=None, v_scale=None, skip=0, lags=None, starts=None, **pattern
) -> Tensor:
    starts = None if starts is None else torch.tensor(starts, dtype=torch.int32)
    places = address_of(k, k_scale), address_of(v, v_scale)
    return cpu_jit.attend_blocks(q, *places, table, lens, lags, Pattern(**pattern, starts=starts), skip=skip)


def written_out(
    q, k, v, lens, scale, is_causal=True, window=None, softcap=None, sinks=None, starts=None, mask=None, skip=0,
    lags=None, compute=torch.float64,
):  # fmt: skip
    """[batch, q_len, num_heads, v_dim] of dense keys and values; 0 where nothing is seen."""
    group, kv_len = q.shape[1] // k.shape[1], k.shape[2]
    column0 = torch.full((len(q),), skip) - (0 if lags is None else lags)
    first = column0 if starts is None else column0 + torch.tensor(starts)
    seen = visible_pairs(q.shape[2], lens, kv_len, is_causal, window, first)
    scores = q.to(compute) @ k.to(compute).repeat_interleave(group, 1).transpose(2, 3) * scale
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    if mask is not None:
        columns = (torch.arange(kv_len) - column0[:, None]).clamp(0, mask.shape[-1] - 1)[:, None, None]
        mask = mask.expand(len(q), -1, -1, -1)
        mask = mask.gather(-1, columns.expand(-1, *mask.shape[1:3], -1))
        seen = seen & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min)
        scores = scores if mask.dtype == torch.bool else scores + mask.to(compute)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        sinks = (sinks[None, :, None, None] if sinks.dim() == 1 else sinks).to(compute)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:3], 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :kv_len].nan_to_num(0.0)
    return (weights @ v.to(compute).repeat_interleave(group, 1)).transpose(1, 2)


def check(rows: Rows, scale=0.2, **options) -> Tensor:
    """Hold the kernel to float64 as tightly as twice what float32 does in torch."""
    assert can_attend(rows.q, address_of(rows.k, None), address_of(rows.v, None))
    out = attend_blocks(*rows, scale=scale, **options)
    dense = rows.q, rows.dense(rows.k), rows.dense(rows.v), rows.seq_lens, scale
    want = written_out(*dense, **options)
    honest = written_out(*dense, **options, compute=torch.float32)
    assert out.dtype == rows.q.dtype
    assert out.is_contiguous()
    bound = 2 * (honest.to(rows.q.dtype) - want).abs().max() + 1e-6
    assert (out - want).abs().max() <= bound, (out - want).abs().max()
    return out


@pytest.mark.parametrize("dim", [32, 40, 64, 80, 100, 128, 192, 256], ids="head_dim {}".format)
def test_every_head_size_agrees(dim):
    check(make_rows((77, 16, 1), sizes=(dim, dim), heads=(8, 2)))


@pytest.mark.parametrize("sizes", [(48, 32), (32, 48), (36, 20)], ids=str)
def test_unlike_head_sizes_agree(sizes):
    check(make_rows((77, 16, 1), sizes=sizes))


HEADS = {"multi-head": (3, 3), "pairs": (4, 2), "threes": (3, 1), "fours": (8, 2), "fives": (5, 1), "eights": (8, 1)}


@pytest.mark.parametrize("q_len", [1, 2, 3, 4, 5, 8, 16], ids="{} queries".format)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_group_and_number_of_queries_agrees(heads, q_len):
    check(make_rows((77, 16, 33), heads=heads, q_len=q_len))
    check(make_rows((77, 16, 33), heads=heads, q_len=q_len), window=7, is_causal=False)


@pytest.mark.parametrize("window", [None, 1, 70], ids="window of {}".format)
def test_chunks_of_a_prompt_agree(window):
    check(make_rows((150, 133), heads=(8, 2), q_len=100), window=window)
    check(make_rows((100, 133), heads=(3, 3), q_len=100), window=window, is_causal=False)
    check(make_rows((CHUNK + 30,), q_len=90), window=window, starts=[CHUNK - 40])


@pytest.mark.parametrize("block_size", [16, 32, 64, 256], ids="blocks of {}".format)
def test_every_length_agrees(block_size):
    for length in range(1, 2 * TILE + 34):
        check(make_rows((length,), block_size=block_size))
    for length in range(3, 2 * TILE + 34, 7):
        check(make_rows((length, 5), block_size=block_size, q_len=3), window=20)


@pytest.mark.parametrize("length", [CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 17], ids="{} tokens".format)
def test_rows_of_several_tasks_agree(length):
    for rows in (make_rows((length, 5, CHUNK)), make_rows((length, 5), q_len=3)):
        check(rows)
        check(rows, window=CHUNK // 2, sinks=torch.tensor([0.0, 1.0, -1.0, 9.0]), softcap=3.0)


@pytest.mark.parametrize("window", [1, 2, 15, 16, 17, 64, 200], ids="window of {}".format)
def test_tokens_behind_a_window_are_not_even_read(window):
    for length in (17, 64, 150):
        rows = make_rows((length,))
        unread = Rows(*(x.clone() for x in rows))
        for token in range(max(0, length - window)):
            for pool in (unread.k, unread.v):
                pool[rows.block_table[0, token // 16], token % 16] = torch.nan
        assert torch.equal(attend_blocks(*unread, scale=0.2, window=window), check(rows, window=window))


def test_left_padding_is_not_even_read():
    rows = make_rows((70, 40, 20))
    starts = [0, 33, 19]
    want = check(rows, starts=starts)
    for row, start in enumerate(starts):
        for token in range(start):
            for pool in (rows.k, rows.v):
                pool[rows.block_table[row, token // 16], token % 16] = torch.nan
    assert torch.equal(attend_blocks(*rows, scale=0.2, starts=starts), want)


EXTRAS = {
    "plain": {},
    "soft capping": {"softcap": 2.0},
    "weak soft capping": {"softcap": 50.0},
    "sinks": {"sinks": torch.linspace(-3, 3, 4)},
    "sinks by query": {"sinks": torch.linspace(-3, 3, 2 * 4 * 3).view(2, 4, 3, 1)},
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_masks_of_every_form_agree(extras):
    rows = make_rows((70, 70), q_len=3)
    draw = torch.Generator().manual_seed(0)
    for shape in ((2, 4, 3, 70), (1, 1, 3, 70), (2, 1, 1, 70), (1, 4, 1, 70)):
        bias = torch.randn(shape, generator=draw)
        hidden = bias.masked_fill(bias > 0.5, torch.finfo(torch.float32).min)
        for mask in (bias > 0, bias, hidden, hidden.double(), bias.bfloat16(), bias.mT.contiguous().mT):
            check(rows, mask=mask, is_causal=False, **extras)
            check(rows, mask=mask, window=30, **extras)


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_combination_agrees(data):
    pick = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    q_len, heads = pick(1, 1, 2, 7), pick(*HEADS.values())
    lengths = [data.draw(st.integers(q_len, 140)) for _ in range(pick(1, 3))]
    rows = make_rows(lengths, heads, q_len=q_len, block_size=pick(16, 32), seed=data.draw(st.integers(0, 9)))
    # Columns as a ragged batch counts them: of the longest row, less what lies behind a window.
    skip, columns = pick(0, 0, 3), max(lengths)
    lags = None if skip >= min(lengths) else torch.tensor([columns - n for n in lengths], dtype=torch.int32)
    if lags is None:
        skip = 0
    mask = torch.randn(pick(1, len(lengths)), pick(1, heads[0]), pick(1, q_len), columns)
    options = {
        "is_causal": pick(True, True, False),
        "window": pick(None, None, 1, 3, 16, 100),
        "softcap": pick(None, 2.0),
        "sinks": pick(None, torch.linspace(-2, 2, heads[0])),
        "starts": pick(None, [data.draw(st.integers(0, n)) for n in lengths]),
        "mask": pick(None, mask, mask > 0),
    }
    check(rows, **options, skip=skip, lags=lags)


def test_a_query_that_sees_nothing_gives_zero():
    rows = make_rows((20,))
    nothing = torch.zeros(1, 1, 1, 20, dtype=torch.bool)
    for mask in (nothing, torch.zeros(1, 1, 1, 20).masked_fill(~nothing, -torch.inf)):
        assert torch.equal(attend_blocks(*rows, scale=1.0, mask=mask), torch.zeros(1, 1, 4, 32))
        sinks = torch.zeros(4)
        assert torch.equal(attend_blocks(*rows, scale=1.0, mask=mask, sinks=sinks), torch.zeros(1, 1, 4, 32))


def test_great_scores_neither_overflow_nor_lose_the_greatest():
    rows = make_rows((150,))
    for scale in (50.0, 1000.0):
        check(rows, scale=scale)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("plane", ["k", "v"])
def test_what_is_not_finite_shows_where_softmax_shows_it(plane, value):
    rows = make_rows((40, 40))
    getattr(rows, plane)[rows.block_table[1, 1], 3, 0, :] = value
    out = attend_blocks(*rows, scale=0.2)
    want = written_out(rows.q, rows.dense(rows.k), rows.dense(rows.v), rows.seq_lens, 0.2)
    assert torch.equal(out[0], attend_blocks(*make_rows((40, 40)), scale=0.2)[0])
    if plane == "v":
        torch.testing.assert_close(out, want.float(), equal_nan=True)
    else:  # written out, inf * q also is NaN where q has both signs
        assert out[1, :, :2].isnan().all()
    assert out[:, :, 2:].isfinite().all()


def test_a_row_does_not_depend_on_its_neighbours():
    rows = make_rows((3 * CHUNK, 33, CHUNK + 9), q_len=2)
    together = attend_blocks(*rows, scale=0.2)
    for row in range(3):
        one = slice(row, row + 1)
        width = -(-int(rows.seq_lens[row]) // 16)
        alone = attend_blocks(
            rows.q[one], rows.k, rows.v, rows.block_table[one, :width].contiguous(), rows.seq_lens[one], scale=0.2
        )
        assert torch.equal(alone[0], together[row])


def test_the_number_of_threads_changes_no_bit(monkeypatch):
    monkeypatch.setattr(cpu_jit, "SERIAL_WORK", 0)
    rows = make_rows((3 * CHUNK, 33, CHUNK + 9), q_len=2)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(cpu_jit, "num_threads", lambda threads=threads: threads)
        results.append(attend_blocks(*rows, scale=0.2))
    assert all(torch.equal(result, results[0]) for result in results)


def test_two_python_threads_may_attend_at_once(monkeypatch):
    monkeypatch.setattr(cpu_jit, "SERIAL_WORK", 0)
    monkeypatch.setattr(cpu_jit, "num_threads", lambda: 2)
    cases = [make_rows((CHUNK + 40 * i, 50), seed=i) for i in range(2)]
    wanted = [attend_blocks(*rows, scale=0.2) for rows in cases]
    done = []

    def work(rows, want):
        for _ in range(50):
            done.append(torch.equal(attend_blocks(*rows, scale=0.2), want))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(cases, wanted, strict=True)]
    for thread in threads:
        thread.start()
    join_while_working(threads, lambda: len(done))
    assert all(done)
    assert len(done) == 100


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_attends_without_waiting_for_threads_that_it_lacks(monkeypatch):
    monkeypatch.setattr(cpu_jit, "SERIAL_WORK", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    rows = make_rows((CHUNK + 40,))
    want = attend_blocks(*rows, scale=0.2)
    assert_in_a_forked_child(lambda: torch.equal(attend_blocks(*rows, scale=0.2), want))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", [(32, 32), (40, 24)], ids=str)
def test_half_precision_is_as_close_as_plain_torch(dtype, sizes):
    rows = make_rows((150, 16, 9), sizes=sizes, q_len=2, dtype=dtype)
    check(rows)
    check(rows, softcap=2.0, sinks=torch.linspace(-2, 2, 4, dtype=dtype), window=50)


PAIRS = {
    "int8": ("int8", "int8"),
    "fp8_e4m3": ("fp8_e4m3", "fp8_e4m3"),
    "fp8_e5m2": ("fp8_e5m2", "fp8_e5m2"),
    "int4": ("int4", "int4"),
    "k8v4": ("int8", "int4"),
    "int8 keys alone": ("int8", "native"),
    "int4 values alone": ("native", "int4"),
}


def stored(pool: Tensor, name: str, scale_dtype: torch.dtype) -> Quantized:
    """A pool in another format; what was NaN in all of a slot is so in its scale."""
    codes, scale = quantize(pool, get_format(name), scale_dtype)
    heads_first = None if scale is None else scale.movedim(2, 0).contiguous().movedim(0, 2)
    return Quantized(codes.movedim(2, 0).contiguous().movedim(0, 2), heads_first)


@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(64, 64), (40, 24)], ids=str)
@pytest.mark.parametrize("names", PAIRS.values(), ids=PAIRS)
def test_every_format_is_read_as_its_reference_says(names, sizes, scale_dtype):
    for options in ({}, {"softcap": 2.0, "sinks": torch.zeros(4), "window": 70}):
        rows = make_rows((150, 16, 9), sizes=sizes, q_len=2, block_size=32)
        k, v = (stored(pool, name, scale_dtype) for pool, name in zip((rows.k, rows.v), names, strict=True))
        assert can_attend(rows.q, address_of(*k), address_of(*v))
        out = attend_blocks(rows.q, k.codes, v.codes, *rows[3:], scale=0.2, k_scale=k.scale, v_scale=v.scale, **options)
        as_read = [dequantize(*pool, get_format(name)) for pool, name in zip((k, v), names, strict=True)]
        dense = rows.q, *(rows.dense(pool) for pool in as_read), rows.seq_lens, 0.2
        want, honest = (written_out(*dense, **options, compute=dtype) for dtype in (torch.float64, torch.float32))
        assert (out - want).abs().max() <= 2 * (honest - want).abs().max() + 1e-6


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e5m2", "int4"])
def test_every_code_is_read_exactly(name):
    # One token a row and weight 1: what comes out is the value itself.
    fmt = get_format(name)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes.view(fmt.code_dtype) if fmt.code_dtype != torch.uint8 else codes
    values = dequantize(codes, torch.ones(256, *fmt.scale_shape)[0], fmt)
    dim = 32 // fmt.codes_per_byte
    pool = torch.zeros(256 // dim, 16, 1, dim, dtype=torch.uint8).view(codes.dtype)
    pool[:, 0, 0] = codes.view(-1, dim)
    scale = torch.ones(len(pool), 16, 1, *fmt.scale_shape)
    table, lens = torch.arange(len(pool), dtype=torch.int32)[:, None], torch.ones(len(pool), dtype=torch.int32)
    q, k = torch.zeros(len(pool), 1, 1, 32), torch.zeros(len(pool), 16, 1, 32)
    out = attend_blocks(q, k, pool, table, lens, scale=1.0, v_scale=scale)
    is_number = values.isfinite()  # a code of NaN or infinity is only stored with a scale of NaN
    assert torch.equal(out.view(-1)[is_number], values[is_number])


def test_a_scale_of_nan_shows_in_its_row_and_head_alone():
    rows = make_rows((40, 40))
    k, v = (stored(pool, "int8", torch.float16) for pool in (rows.k, rows.v))
    for scale in (k.scale, v.scale):
        one = scale.clone()
        one[rows.block_table[1, 1], 3, 0] = torch.nan
        scales = (one, v.scale) if scale is k.scale else (k.scale, one)
        out = attend_blocks(rows.q, k.codes, v.codes, *rows[3:], scale=0.2, k_scale=scales[0], v_scale=scales[1])
        assert out[1, :, :2].isnan().all()
        assert out[0].isfinite().all()
        assert out[1, :, 2:].isfinite().all()


@pytest.mark.parametrize("dim", [40, 64], ids="head_dim {}".format)
def test_avx2_agrees(dim, avx2):
    for heads in (8, 2), (3, 1), (4, 2), (2, 2):
        check(make_rows((77, 16, 1), sizes=(dim, dim), heads=heads), softcap=2.0)
        check(make_rows((77, 16, 1), sizes=(dim, dim), heads=heads, dtype=torch.float16))


def test_what_cannot_be_taken_is_left_to_torch():
    rows = make_rows((40,))
    q, k, v = rows.q, *(address_of(pool, None) for pool in (rows.k, rows.v))
    assert can_attend(q, k, v)
    assert not can_attend(q.double(), k, v)
    assert not can_attend(q.clone().requires_grad_(), k, v)
    assert not can_attend(q[:0], k, v)
    assert not can_attend(q.expand(-1, -1, 5000, -1), k, v)
    for pool in (rows.k.mT.contiguous().mT, rows.k[:, :8], rows.k.double(), rows.k.to("meta")):
        assert address_of(pool, None) is None
    compiled = []
    torch.compile(lambda: compiled.append(can_attend(q, k, v)), backend="eager")()
    assert compiled == [False]


def test_a_default_dtype_and_device_change_nothing():
    rows = make_rows((77, 16))
    want = attend_blocks(*rows, scale=0.2, starts=(1, 0))
    places, pattern = (address_of(rows.k, None), address_of(rows.v, None)), Pattern(0.2, starts=[1, 0])
    torch.set_default_dtype(torch.float16)  # a result of half the bytes would be written past its end
    torch.set_default_device("meta")
    try:
        got = cpu_jit.attend_blocks(rows.q, *places, *rows[3:], None, pattern)
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32
    assert torch.equal(got, want)
