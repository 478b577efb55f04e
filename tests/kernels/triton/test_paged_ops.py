"""paged_decode and paged_prefill against float32 attention over what the pools hold.

Both take the same arguments and answer to the same reference, so each case runs both.
"""

import itertools

import pytest
import torch

from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import attention_reference, visible_pairs
from hf_kvopt.kernels.triton.launch import INTERPRETER, Config
from hf_kvopt.kernels.triton.paged_decode import decode_scratch, paged_decode, plan_paged_decode
from hf_kvopt.kernels.triton.paged_prefill import paged_prefill
from hf_kvopt.kernels.triton.splits import most_keys
from tests.kernels.triton.conftest import assert_close, assert_lse, make_paged, make_query, same_dtype_torch

OPS = pytest.mark.parametrize("op", [paged_decode, paged_prefill], ids=["decode", "prefill"])
FORMATS = pytest.mark.parametrize(
    "formats",
    [
        ("native", "native"),
        ("int8", "int8"),
        ("fp8_e4m3", "fp8_e4m3"),
        ("fp8_e5m2", "fp8_e5m2"),
        ("int4", "int4"),
        ("int8", "int4"),
        ("native", "int4"),
        ("int4", "native"),
    ],
    ids="-".join,
)
SCALE = 0.25


def check(op, q, paged, *, is_causal=True, window=None, starts=None, softcap=None, sinks=None, mask=None, **extra):
    """Run the op and hold it to the float32 reference and to the derived tolerance."""
    pattern = {"softcap": softcap, "sinks": sinks, "mask": mask}
    got = op(q, paged.kv, Pattern(SCALE, is_causal, window, starts=starts, **pattern), **extra)
    seen = visible_pairs(q.shape[2], paged.seq_lens, paged.k.shape[2], is_causal, window, starts)
    if mask is not None and mask.shape[-1] < paged.k.shape[2]:
        seen = seen & (torch.arange(paged.k.shape[2]) < mask.shape[-1])
        pattern["mask"] = torch.nn.functional.pad(mask, (0, paged.k.shape[2] - mask.shape[-1]))
    reference = attention_reference(q.float(), paged.k, paged.v, seen, SCALE, **pattern)
    honest = None
    if q.dtype != torch.float32:
        honest = same_dtype_torch(q, paged.k, paged.v, seen, SCALE, **pattern)
    assert_close(got.out, reference.out, honest)
    assert_lse(got.lse, reference.lse, 1e-4 if q.dtype == torch.float32 else 2e-2)
    return got


@OPS
@pytest.mark.parametrize("start", range(1, 33, 4))
def test_every_residue_of_length_modulo_block(op, start):
    """Four lengths a case: all of 1 to 32, each in a batch of permuted blocks with NaN around it."""
    paged = make_paged(list(range(start, start + 4)), num_kv_heads=1)
    check(op, make_query(4, 2, 1, 32), paged)


@OPS
@FORMATS
def test_every_format_at_every_fourth_residue(op, formats):
    paged = make_paged([1, 4, 15, 16, 17, 23, 28, 32], num_kv_heads=1, formats=formats)
    check(op, make_query(8, 2, 1, 32), paged)


@OPS
@FORMATS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_stays_within_the_derived_tolerance(op, formats, dtype):
    paged = make_paged([19, 37], formats=formats, dtype=dtype)
    check(op, make_query(2, 4, 2, 32, dtype), paged)


@OPS
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("formats", [("native", "native"), ("int8", "int4")], ids="-".join)
def test_head_sizes(op, head_dim, formats):
    check(op, make_query(1, 2, 1, head_dim), make_paged([21], num_kv_heads=1, k_dim=head_dim, formats=formats))


@OPS
@pytest.mark.parametrize("formats", [("native", "native"), ("int4", "int8")], ids="-".join)
def test_key_and_value_sizes_may_differ(op, formats):
    paged = make_paged([21, 5], num_kv_heads=2, k_dim=192, v_dim=128, formats=formats)
    check(op, make_query(2, 2, 1, 192), paged)


@OPS
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads"), [(3, 3), (6, 2), (7, 1), (20, 1)], ids=["mha", "gqa", "mqa", "mqa-two-tiles"]
)
def test_head_groups(op, num_heads, num_kv_heads):
    check(op, make_query(2, num_heads, 3, 32), make_paged([3, 33], num_kv_heads=num_kv_heads))


@OPS
def test_empty_rows_are_zero_and_one_token_is_its_value(op):
    paged = make_paged([0, 1, 0, 18])
    got = check(op, make_query(4, 2, 1, 32), paged)
    assert (got.out[0] == 0).all()
    assert (got.lse[0] == -torch.inf).all()
    assert torch.allclose(got.out[1, 0], paged.v[1, :, 0], atol=1e-6)


@OPS
def test_a_batch_of_empty_rows_only(op):
    check(op, make_query(2, 2, 1, 32), make_paged([0, 0]))


@OPS
@pytest.mark.parametrize("q_len", [2, 5, 17, 40])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_several_queries_are_aligned_bottom_right(op, q_len, is_causal):
    check(op, make_query(2, 4, q_len, 32), make_paged([q_len, q_len + 19]), is_causal=is_causal)


@OPS
def test_a_row_shorter_than_its_queries_gives_zeros_first(op):
    got = check(op, make_query(2, 2, 6, 32), make_paged([4, 20]))
    assert (got.out[0, :2] == 0).all()


@OPS
@pytest.mark.parametrize("window", [1, 7, 16, 17, 27, 100])
def test_window(op, window):
    """27: a tile begins where the first query's window does, and the last query's later."""
    check(op, make_query(2, 2, 3, 32), make_paged([9, 45], num_kv_heads=1), window=window)


@OPS
def test_blocks_freed_behind_the_window_are_never_read(op):
    paged = make_paged([70], num_kv_heads=1)
    freed = paged.block_table[0, :3].clone()
    q = make_query(1, 2, 2, 32)
    paged.block_table[0, :3] = -1
    paged.k_pool[freed.long()] = torch.nan
    paged.v_pool[freed.long()] = torch.nan
    check(op, q, paged, window=20)


@OPS
@pytest.mark.parametrize("window", [None, 6])
def test_left_padding_hides_what_lies_before_the_start(op, window):
    paged = make_paged([40, 23, 17], num_kv_heads=1)
    starts = torch.tensor([0, 18, 17], dtype=torch.int32)
    for row, start in enumerate(starts.tolist()):
        rows = torch.arange(start)
        blocks = paged.block_table[row, rows // 16].long()
        paged.k_pool[blocks, rows % 16] = torch.nan
        paged.v_pool[blocks, rows % 16] = torch.nan
    check(op, make_query(3, 2, 2, 32), paged, starts=starts, window=window)


@OPS
@pytest.mark.parametrize("softcap", [0.5, 30.0])
def test_softcap(op, softcap):
    check(op, make_query(2, 4, 2, 32) * 3, make_paged([5, 37]), softcap=softcap)


@OPS
@pytest.mark.parametrize("lens", [[0, 12], [50, 0]], ids=["one-tile", "several-splits"])
def test_sinks_join_the_denominator_once(op, lens):
    check(op, make_query(2, 4, 1, 32), make_paged(lens), sinks=torch.randn(4) * 3)


MASK_SHAPES = [s for s in itertools.product((1, 2), (1, 4), (1, 3)) if s != (2, 4, 1)]


@OPS
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=["bool", "additive"])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
def test_explicit_masks_broadcast(op, kind, shape):
    paged = make_paged([20, 35])
    mask = torch.rand(*shape, 35) < 0.6
    if kind != torch.bool:
        mask = torch.randn(*shape, 35).masked_fill(~mask, torch.finfo(kind).min)
    check(op, make_query(2, 4, 3, 32), paged, mask=mask, is_causal=False)


@OPS
def test_mask_of_any_strides_and_longer_or_shorter_than_the_keys(op):
    paged = make_paged([20, 35])
    q = make_query(2, 4, 3, 32)
    wide = (torch.rand(60, 3, 1, 2) < 0.6).permute(3, 2, 1, 0)
    check(op, q, paged, mask=wide, is_causal=True)
    check(op, q, paged, mask=wide[..., :18], is_causal=False)


@OPS
def test_a_row_that_the_mask_hides_entirely_is_zero(op):
    mask = torch.ones(1, 1, 2, 20, dtype=torch.bool)
    mask[:, :, 0] = False
    got = check(op, make_query(1, 2, 2, 32), make_paged([20]), mask=mask)
    assert (got.out[0, 0] == 0).all()


@OPS
def test_draft_tree_mask_over_quantized_keys(op):
    """Seven draft nodes, each seeing the 20 tokens before and its ancestors."""
    parents = [-1, 0, 0, 1, 1, 2, 5]
    mask = torch.zeros(7, 27, dtype=torch.bool)
    mask[:, :20] = True
    for node, parent in enumerate(parents):
        mask[node, 20 + node] = True
        if parent >= 0:
            mask[node, 20:] |= mask[parent, 20:]
    paged = make_paged([27], num_kv_heads=1, formats=("int8", "int8"))
    check(op, make_query(1, 4, 7, 32), paged, mask=mask[None, None], is_causal=False)


@OPS
@pytest.mark.parametrize("formats", [("native", "native"), ("int4", "fp8_e4m3")], ids="-".join)
def test_everything_at_once(op, formats):
    starts = torch.tensor([2, 0, 30], dtype=torch.int32)
    check(
        op,
        make_query(3, 4, 4, 40),
        make_paged([37, 18, 50], k_dim=40, v_dim=48, formats=formats),
        window=21,
        softcap=5.0,
        sinks=torch.randn(4),
        starts=starts,
        mask=torch.rand(3, 1, 4, 50) < 0.8,
    )


@OPS
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("block_n", [16, 32, 128])
def test_tiles_smaller_and_larger_than_a_block(op, block_size, block_n):
    config = Config(16, block_n, 4, 1)
    check(op, make_query(2, 2, 2, 32), make_paged([40, 97], num_kv_heads=1, block_size=block_size), config=config)


@OPS
def test_queries_of_any_stride(op):
    paged = make_paged([20, 9])
    q = torch.randn(2, 3, 4, 2, 40).permute(0, 2, 1, 3, 4)[:, :, :, 1, :32]
    assert q.stride(-1) == 1
    check(op, q, paged)
    check(op, torch.randn(1, 4, 1, 32).expand(2, -1, 3, -1), paged)


@OPS
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.float32], ids=str)
def test_both_scale_types(op, scale_dtype):
    check(op, make_query(1, 2, 1, 32), make_paged([20], formats=("int8", "int4"), scale_dtype=scale_dtype))


@OPS
@pytest.mark.parametrize("name", ["native", "int8", "int4"])
def test_a_nan_key_shows_as_nan_in_its_row_only(op, name):
    paged = make_paged([20, 20], num_kv_heads=1, formats=(name, name))
    block = int(paged.block_table[1, 0])
    (paged.k_pool if name == "native" else paged.k_scale)[block, 3] = torch.nan
    got = op(make_query(2, 2, 1, 32), paged.kv, Pattern(SCALE))
    assert got.out[0].isfinite().all()
    assert got.out[1].isnan().all()


@pytest.mark.parametrize("num_splits", [1, 2, 5, 8])
@pytest.mark.parametrize("lens", [[3, 100], [64, 17], [0, 1]], ids=str)
def test_any_number_of_splits_gives_the_same(num_splits, lens):
    check(paged_decode, make_query(2, 2, 1, 32), make_paged(lens, num_kv_heads=1), num_splits=num_splits)


def test_lengths_may_change_between_calls_of_one_scratch():
    """What a CUDA graph needs: same tensors, new lengths, stale scratch."""
    paged = make_paged([90, 100], num_kv_heads=1)
    q = make_query(2, 2, 1, 32)
    scratch = decode_scratch(q, 1, 32, 7 * 16).fill_(torch.nan)
    for lens in ([90, 100], [3, 64], [0, 33], [90, 1]):
        paged.seq_lens.copy_(torch.tensor(lens))
        now = paged._replace(k=paged.k.clone(), v=paged.v.clone())
        for row, length in enumerate(lens):
            now.k[row, :, length:] = 0
            now.v[row, :, length:] = 0
        check(paged_decode, q, now, scratch=scratch)


def test_row_is_bit_equal_alone_and_beside_a_larger_one():
    """Storage is row-wise exact: same tiles, same splits, so even float32 bits agree."""
    paged = make_paged([20, 20], num_kv_heads=1, formats=("int8", "int8"))
    paged.k_scale[paged.block_table[1, 0].long()] *= 100
    q = make_query(2, 2, 1, 32)
    both = paged_prefill(q, paged.kv, Pattern(SCALE))
    first = paged.kv._replace(block_table=paged.block_table[:1], seq_lens=paged.seq_lens[:1])
    alone = paged_prefill(q[:1], first, Pattern(SCALE))
    assert torch.equal(both.out[:1], alone.out)


def test_splits_are_shared_out_by_what_a_window_shows():
    """Of a row of 64 tiles, a window of 4 is spread over as many programs as a row of 4 tiles."""
    paged, q = make_paged((1024,), num_kv_heads=1), make_query(1, 2, 1, 32)
    out, lse = torch.empty(1, 1, 2, 32), torch.empty(1, 2, 1)
    scratch = torch.full((5 * (out.numel() + lse.numel()),), torch.nan)
    pattern, config = Pattern(SCALE, window=64), Config(16, 16, 4, 1)
    splits = plan_paged_decode(q, paged.kv, pattern, out, lse, scratch, INTERPRETER, config, 5)[0]
    splits.run()
    assert int((splits.args["lse_ptr"][:, 0, 0, 0] != -torch.inf).sum()) == 4
    check(paged_decode, q, paged, window=64, num_splits=5)
    assert most_keys(pattern, 3, 1024) == 66
    assert most_keys(pattern._replace(window=None), 3, 1024) == most_keys(pattern, 3000, 1024) == 1024
