"""Decode over tokens that rows share, read once, against float32 attention of each row over all of its tokens."""

import pytest
import torch

from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import attention_reference, visible_pairs
from hf_kvopt.kernels.triton import ops
from hf_kvopt.kernels.triton.cascade import cascade
from tests.kernels.triton.conftest import assert_close, assert_lse, make_paged, make_query, same_dtype_torch

SCALE = 0.25


def make_shared(shared, seq_lens, **options):
    """Rows of which those of run i begin with the same `shared[i]` tokens; what the others held there is NaN."""
    paged = make_paged(seq_lens, **options)
    size, block_size = len(seq_lens) // len(shared), paged.k_pool.shape[1]
    for row in range(len(seq_lens)):
        first, tokens = row - row % size, shared[row // size]
        if row != first:
            blocks = paged.block_table[row, : tokens // block_size].long()
            for pool in (paged.k_pool, paged.v_pool):
                pool[blocks] = torch.full((), torch.nan).to(pool.dtype) if pool.is_floating_point() else 127
            paged.block_table[row, : len(blocks)] = -1  # not even looked at
            for states in (paged.k, paged.v):
                states[row, :, :tokens] = states[first, :, :tokens]
    return paged, paged.kv._replace(shared=torch.tensor(shared, dtype=torch.int32))


def check(shared, seq_lens, num_heads=4, q_len=1, dtype=torch.float32, softcap=None, sinks=None, mask=None, starts=None,
          **options):  # fmt: skip
    paged, kv = make_shared(shared, seq_lens, dtype=dtype, **options)
    q = make_query(len(seq_lens), num_heads, q_len, paged.k.shape[3], dtype)
    got = cascade(q, kv, Pattern(SCALE, softcap=softcap, sinks=sinks, mask=mask, starts=starts))
    seen = visible_pairs(q_len, paged.seq_lens, paged.k.shape[2], True, None, starts)
    extras = {"softcap": softcap, "sinks": sinks, "mask": mask}
    want = attention_reference(q.float(), paged.k, paged.v, seen, SCALE, **extras)
    honest = None if dtype == torch.float32 else same_dtype_torch(q, paged.k, paged.v, seen, SCALE, **extras)
    assert_close(got.out, want.out, honest)
    assert_lse(got.lse, want.lse, 1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("shared", [0, 16, 32, 64], ids="{} shared tokens".format)
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2), (20, 1)], ids=["mha", "gqa", "mqa-two-tiles"])
def test_rows_read_what_they_share_once(num_heads, num_kv_heads, shared):
    check([shared], [shared + 1, shared + 17, shared + 5], num_heads, num_kv_heads=num_kv_heads)


def test_runs_share_unlike_many_tokens():
    check([48, 0, 16], [49, 60, 20, 3, 17, 40])


@pytest.mark.parametrize("q_len", [2, 5], ids="{} queries".format)
def test_several_queries_a_row(q_len):
    check([32, 16], [32 + q_len, 50, 16 + q_len, 30], q_len=q_len)


@pytest.mark.parametrize("formats", [("int8", "int8"), ("fp8_e4m3", "fp8_e5m2"), ("int4", "native")], ids="-".join)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_storage(formats, dtype):
    check([32], [33, 50], formats=formats, dtype=dtype)


def test_sinks_and_caps_are_counted_once():
    check([32], [33, 50], sinks=torch.tensor([0.5, -1.0, 2.0, 0.0]), softcap=2.0)


@pytest.mark.parametrize("shape", [(4, 1, 1, 60), (1, 4, 1, 60), (1, 1, 1, 60), (4, 4, 1, 60)], ids=str)
def test_masks_are_those_of_each_row(shape):
    bias = torch.randn(shape)
    check([32, 16], [33, 60, 17, 40], mask=bias > -0.5)
    check([32, 16], [33, 60, 17, 40], mask=bias)


def test_padding_of_a_run():
    check([32, 16], [33, 60, 17, 40], starts=torch.tensor([3, 3, 20, 16], dtype=torch.int32))


def test_queries_need_not_be_contiguous():
    paged, kv = make_shared([16], [20, 30])
    q = torch.randn(2, 4, 3, 64)[..., ::1][:, :, :, :32]
    want = attention_reference(q, paged.k, paged.v, visible_pairs(3, paged.seq_lens, 30, True, None, None), SCALE)
    assert_close(cascade(q, kv, Pattern(SCALE)).out, want.out)


def test_the_op_reads_row_by_row_where_a_mask_has_no_view_by_runs(monkeypatch):
    paged, kv = make_shared([16], [20, 30])
    with monkeypatch.context() as patch:
        patch.setattr(ops._cascade, "cascade", None)
        paged.block_table[1, 0] = paged.block_table[0, 0]
        q, mask = make_query(2, 4, 3, 32), torch.ones(1, 1, 3, 30, dtype=torch.bool).tril(27)
        got = ops.paged_decode(q, kv._replace(block_table=paged.block_table), Pattern(SCALE, mask=mask))
    want = attention_reference(
        q, paged.k, paged.v, visible_pairs(3, paged.seq_lens, 30, True, None, None), SCALE, mask=mask
    )
    assert_close(got.out, want.out)


@pytest.mark.parametrize(
    ("shared", "text"),
    [
        (torch.tensor([16, 16, 16], dtype=torch.int32), "one entry for each run of a batch of 2 rows: got 3"),
        (torch.tensor([], dtype=torch.int32), "one entry for each run"),
        (torch.tensor([16]), "int32"),
    ],
    ids=["uneven", "none", "int64"],
)
def test_what_is_no_run_is_refused(shared, text):
    _, kv = make_shared([16], [20, 30])
    with pytest.raises((TypeError, ValueError), match=text):
        cascade(make_query(2, 4, 1, 32), kv._replace(shared=shared), Pattern(SCALE))
