"""Tokens that rows share are read once for all, and no bit of the output shows it."""

import pytest
import torch

from hf_kvopt.kernels.calls import SharedBlocks
from hf_kvopt.kernels.cpu import paged_attention as cpu_jit
from hf_kvopt.kernels.cpu.address import address_of
from hf_kvopt.kernels.cpu.jit.spec import CHUNK
from hf_kvopt.kernels.cpu.program import can_compile
from hf_kvopt.kernels.pattern import Pattern
from tests.kernels.cpu.test_paged_attention import HEADS, PAIRS, Rows, make_rows, stored

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")


def make_runs(shared, lengths, **options) -> tuple[Rows, SharedBlocks]:
    """Rows of which those of run i begin with the same `shared[i]` tokens, and with the blocks that are left unread
    in their place full of NaN."""
    rows, size = make_rows(lengths, **options), len(lengths) // len(shared)
    for row in range(len(lengths)):
        first = row - row % size
        count = shared[row // size] // rows.k.shape[1]
        if row != first:
            for pool in (rows.k, rows.v):
                pool[rows.block_table[row, :count].long()] = torch.nan
            rows.block_table[row, :count] = rows.block_table[first, :count]
    tokens = torch.tensor(shared, dtype=torch.int32)
    return rows, SharedBlocks(tokens, max(shared), (size - 1) * sum(shared))


def attend(rows: Rows, shared: SharedBlocks | None, formats=("native", "native"), lags=None, **pattern):
    k, v = (stored(pool, name, torch.float16) for pool, name in zip((rows.k, rows.v), formats, strict=True))
    places = address_of(*k), address_of(*v)
    return cpu_jit.attend_blocks(
        rows.q, *places, rows.block_table, rows.seq_lens, lags, Pattern(0.2, **pattern), shared=shared
    )


def check(rows: Rows, shared: SharedBlocks, formats=("native", "native"), **pattern):
    """Compare with each row alone: no row may know whether others read its tokens."""
    out = attend(rows, shared, formats, **pattern)
    assert out.isfinite().all()
    assert torch.equal(out, attend(rows, None, formats, **pattern))
    for row in range(len(rows.q)):
        one = slice(row, row + 1)
        alone = rows._replace(q=rows.q[one], block_table=rows.block_table[one], seq_lens=rows.seq_lens[one])
        assert torch.equal(attend(alone, None, formats, **pattern)[0], out[row])


@pytest.mark.parametrize("q_len", [1, 2, 5], ids="{} queries".format)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_group_and_number_of_queries_is_equal(heads, q_len):
    check(*make_runs([64], (77, 70, 90), heads=heads, q_len=q_len))


@pytest.mark.parametrize("dim", [32, 40, 64, 100, 256], ids="head_dim {}".format)
def test_every_head_size_is_equal(dim):
    check(*make_runs([128], (140, 150), sizes=(dim, dim), heads=(8, 2)))


@pytest.mark.parametrize("shared", [CHUNK - 64, CHUNK, CHUNK + 64, 2 * CHUNK], ids="{} tokens".format)
def test_rows_of_several_tasks_are_equal(shared):
    check(*make_runs([shared], (shared + 1, shared + 70, 2 * CHUNK + 30)))


def test_runs_may_share_unlike_many_tokens():
    check(*make_runs([CHUNK + 128, 0, 64], (CHUNK + 130, CHUNK + 200, 20, 40, 65, 500), q_len=1))


def test_rows_may_end_where_their_beginning_ends():
    check(*make_runs([64], (65, 65, 65)))
    check(*make_runs([64], (64, 64, 64)), is_causal=False)


@pytest.mark.parametrize("formats", PAIRS.values(), ids=PAIRS)
def test_every_format_is_equal(formats):
    for sizes in ((64, 64), (40, 24)):
        check(*make_runs([192], (200, 250, 193), sizes=sizes, heads=(6, 2)), formats)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_equal(dtype):
    check(*make_runs([192], (200, 250, 193), sizes=(40, 24), dtype=dtype))


def test_caps_and_sinks_are_equal():
    rows = make_runs([192], (200, 250, 193))
    check(*rows, softcap=2.0)
    check(*rows, sinks=torch.linspace(-2, 2, 4), window=300)
    by_row = {"sinks": torch.linspace(-2, 2, 12).view(3, 4, 1, 1)}
    assert torch.equal(attend(*rows, **by_row), attend(rows[0], None, **by_row))


@pytest.mark.parametrize("shape", [(4, 4, 3, 250), (1, 1, 1, 250), (4, 1, 1, 250), (1, 4, 3, 250)], ids=str)
def test_masks_are_those_of_each_row(shape):
    rows, shared = make_runs([64, 192], (200, 77, 220, 250), q_len=3)
    lags = torch.tensor([50, 173, 30, 0], dtype=torch.int32)
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for mask in (bias > 0, bias, bias.masked_fill(bias > 0.5, -torch.inf)):
        for options in ({"mask": mask}, {"mask": mask, "lags": lags}, {"mask": mask, "lags": lags, "softcap": 2.0}):
            assert torch.equal(attend(rows, shared, **options), attend(rows, None, **options))


@pytest.mark.parametrize("hidden", [1, 64, 100, CHUNK + 1, CHUNK + 129], ids="{} tokens".format)
def test_padding_that_a_run_shares_is_not_even_read(hidden):
    rows, shared = make_runs([0, CHUNK + 128], (40, 30, CHUNK + 130, CHUNK + 150))
    lags = torch.tensor([0, 0, 20, 0], dtype=torch.int32)
    starts = torch.tensor([0, 3, hidden + 20, hidden], dtype=torch.int32)
    want = attend(rows, None, starts=starts, lags=lags)
    assert torch.equal(attend(rows, shared, starts=starts, lags=lags), want)
    for token in range(hidden):
        for pool in (rows.k, rows.v):
            pool[rows.block_table[2, token // 16], token % 16] = torch.nan
    if hidden < CHUNK + 128:
        assert torch.equal(attend(rows, shared, starts=starts, lags=lags), want)


@pytest.mark.parametrize("threads", [1, 2, 3, 16], ids="{} threads".format)
def test_neither_threads_nor_pieces_change_a_bit(monkeypatch, threads):
    monkeypatch.setattr(cpu_jit, "SERIAL_WORK", 0)
    monkeypatch.setattr(cpu_jit, "num_threads", lambda: threads)
    rows = make_runs([128, 64], (200,) * 10, heads=(6, 2), q_len=2)
    for most in (1, 40, 128):
        monkeypatch.setattr(cpu_jit, "MAX_SHARED_QUERIES", most)
        check(*rows)


def test_shared_tokens_are_read_by_one_row_for_all():
    """Blocks of the other rows' tables are not looked at: what is attended to before lies in the first row's."""
    rows, shared = make_runs([CHUNK], (CHUNK + 8,) * 4)
    want = attend(rows, None)
    rows.block_table[1:, : CHUNK // 16] = 0  # all NaN
    assert torch.equal(attend(rows, shared), want)


def test_what_is_not_finite_stays_in_its_row():
    rows, shared = make_runs([64], (77, 70, 90))
    rows.q[1] = torch.nan
    out = attend(rows, shared)
    assert out[1].isnan().all()
    assert out[[0, 2]].isfinite().all()
