"""flash_prefill against float32 attention, on the pointer path and through tensor descriptors."""

import pytest
import torch

from hf_kvopt.kernels.packed import Packed
from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import visible_pairs
from hf_kvopt.kernels.triton.flash_prefill import flash_prefill, flash_prefill_reference
from hf_kvopt.kernels.triton.launch import Config
from tests.kernels.triton.conftest import assert_close, assert_lse, make_query, same_dtype_torch

SCALE = 0.25
POINTERS, DESCRIPTORS = Config(16, 16, 4, 1), Config(16, 16, 4, 1, tma=True)
PATHS = pytest.mark.parametrize("config", [POINTERS, DESCRIPTORS], ids=["pointers", "descriptors"])


def check(q, k, v, config=POINTERS, packed=None, **extras):
    pattern = Pattern(SCALE, **extras)
    got = flash_prefill(q, k, v, pattern, packed, config=config)
    reference = flash_prefill_reference(q.float(), k.float(), v.float(), pattern, packed)
    honest = None
    if q.dtype != torch.float32:
        lens = torch.full((q.shape[0],), k.shape[2])
        seen = visible_pairs(q.shape[2], lens, k.shape[2], pattern.is_causal, pattern.window, pattern.starts)
        honest = same_dtype_torch(q, k, v, seen, SCALE, pattern.softcap, pattern.sinks, pattern.mask)
    assert_close(got.out, reference.out, honest)
    assert_lse(got.lse, reference.lse, 1e-4 if q.dtype == torch.float32 else 2e-2)
    return got


def make_states(batch, num_heads, num_kv_heads, q_len, kv_len, k_dim=32, v_dim=None, dtype=torch.float32):
    return (
        make_query(batch, num_heads, q_len, k_dim, dtype),
        make_query(batch, num_kv_heads, kv_len, k_dim, dtype),
        make_query(batch, num_kv_heads, kv_len, v_dim or k_dim, dtype),
    )


@PATHS
@pytest.mark.parametrize("kv_len", range(1, 34, 2))
def test_every_other_length(config, kv_len):
    check(*make_states(1, 1, 1, kv_len, kv_len), config)


@PATHS
@pytest.mark.parametrize(("q_len", "kv_len"), [(1, 20), (5, 33), (20, 20), (33, 35), (20, 5)], ids=str)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_queries_are_aligned_bottom_right(config, q_len, kv_len, is_causal):
    check(*make_states(1, 2, 1, q_len, kv_len), config, is_causal=is_causal)


@PATHS
@pytest.mark.parametrize("head_dim", [32, 40, 64, 80, 96, 128, 192, 256])
def test_head_sizes(config, head_dim):
    check(*make_states(1, 1, 1, 18, 18, head_dim), config)


@PATHS
def test_key_and_value_sizes_may_differ(config):
    check(*make_states(1, 2, 2, 18, 18, 192, 128), config)
    check(*make_states(1, 2, 2, 18, 18, 40, 72), config)


@PATHS
@pytest.mark.parametrize(("num_heads", "num_kv_heads"), [(3, 3), (6, 2), (5, 1)], ids=["mha", "gqa", "mqa"])
def test_head_groups(config, num_heads, num_kv_heads):
    check(*make_states(2, num_heads, num_kv_heads, 18, 20), config)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_half_precision_stays_within_the_derived_tolerance(config, dtype, is_causal):
    check(*make_states(1, 2, 1, 35, 35, 64, dtype=dtype), config, is_causal=is_causal)


@PATHS
@pytest.mark.parametrize("window", [1, 7, 16, 17, 33, 100])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_window(config, window, is_causal):
    check(*make_states(1, 1, 1, 40, 45), config, window=window, is_causal=is_causal)


@PATHS
def test_softcap_and_sinks(config):
    q, k, v = make_states(1, 4, 2, 20, 20)
    check(q * 3, k, v, config, softcap=0.7, sinks=torch.randn(4) * 3)


@pytest.mark.parametrize("window", [None, 9])
def test_left_padding_is_never_read(window):
    q, k, v = make_states(3, 2, 1, 30, 40)
    starts = torch.tensor([0, 17, 40], dtype=torch.int32)
    for row, start in enumerate(starts.tolist()):
        k[row, :, :start] = torch.nan
        v[row, :, :start] = torch.nan
    got = check(q, k, v, starts=starts, window=window)
    assert (got.out[2] == 0).all()


@PATHS
@pytest.mark.parametrize("kind", [torch.bool, torch.float32], ids=["bool", "additive"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 19), (1, 2, 19), (2, 2, 1)], ids=str)
def test_explicit_masks_broadcast(config, kind, shape):
    mask = torch.rand(*shape, 35) < 0.6
    if kind != torch.bool:
        mask = torch.randn(*shape, 35).masked_fill(~mask, torch.finfo(kind).min)
    check(*make_states(2, 2, 1, 19, 35), config, mask=mask, is_causal=False)


@PATHS
def test_a_mask_joins_the_pattern_and_may_be_shorter_than_the_keys(config):
    mask = (torch.rand(40, 19, 1, 1) < 0.7).permute(2, 3, 1, 0)
    check(*make_states(2, 2, 1, 19, 35), config, mask=mask, window=12)
    check(*make_states(2, 2, 1, 19, 35), config, mask=mask[..., :20], is_causal=False)


@PATHS
def test_a_row_that_the_mask_hides_entirely_is_zero(config):
    mask = torch.ones(1, 1, 4, 20, dtype=torch.bool)
    mask[:, :, 2] = False
    got = check(*make_states(1, 2, 2, 4, 20), config, mask=mask)
    assert (got.out[0, 2] == 0).all()


def test_the_least_float16_of_an_additive_mask_hides_too():
    """-65504 is finite in the scores: without a rule of its own a hidden row would average what it must not see."""
    mask = torch.zeros(1, 1, 4, 20, dtype=torch.float16)
    mask[:, :, 1] = torch.finfo(torch.float16).min
    mask[:, :, 3, ::2] = torch.finfo(torch.float16).min
    got = check(*make_states(1, 2, 2, 4, 20), mask=mask, is_causal=False)
    assert (got.out[0, 1] == 0).all()


@pytest.mark.parametrize("window", [None, 8])
@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
def test_packed_sequences_do_not_see_each_other(window, is_causal):
    """Four sequences, one empty, one with keys before its queries; behind them NaN."""
    lens_q, lens_k = [5, 0, 18, 1], [5, 3, 35, 17]
    cu_q = torch.tensor([0, *torch.tensor(lens_q).cumsum(0).tolist()], dtype=torch.int32)
    cu_k = torch.tensor([0, *torch.tensor(lens_k).cumsum(0).tolist()], dtype=torch.int32)
    q, k, v = make_states(1, 2, 1, sum(lens_q) + 2, sum(lens_k) + 9)
    k[:, :, sum(lens_k) :] = torch.nan
    v[:, :, sum(lens_k) :] = torch.nan
    packed = Packed(cu_q, cu_k, max_q_len=18)
    got = check(q, k, v, packed=packed, is_causal=is_causal, window=window)
    assert (got.out[0, -2:] == 0).all()
    # One sequence's NaN stays its own.
    k[:, :, :5], v[:, :, :5] = torch.nan, torch.nan
    again = flash_prefill(q, k, v, Pattern(SCALE, is_causal, window), packed)
    assert torch.equal(again.out[:, 5:], got.out[:, 5:])


@PATHS
def test_tensors_of_any_stride(config):
    q = torch.randn(2, 20, 3, 2, 40).permute(0, 3, 1, 2, 4)[:, :, :, 1, :32]
    k = torch.randn(1, 1, 24, 32).expand(2, 2, -1, -1)
    v = torch.randn(2, 24, 2, 48).transpose(1, 2)[..., 8:40]
    check(q, k, v, config)


@PATHS
def test_channels_beyond_a_padded_head_are_never_read(config):
    """40 channels are padded to 64 in registers; what lies there in memory is another tensor's."""
    q, k, v = (torch.full((1, 2, 35, 64), torch.nan) for _ in range(3))
    for x in (q, k, v):
        x[..., :40] = torch.randn(1, 2, 35, 40)
    check(q[..., :40], k[..., :40], v[..., :40], config)
    check(q[..., :40], k[..., :40], v[..., :40], config, window=20)


@PATHS
@pytest.mark.parametrize("tiles", [(32, 16), (16, 64), (64, 32)], ids=str)
def test_other_tiles_give_the_same(config, tiles):
    config = config._replace(block_m=tiles[0], block_n=tiles[1])
    check(*make_states(1, 1, 1, 70, 75), config)
    check(*make_states(1, 1, 1, 70, 75), config, window=20)


def test_no_keys_give_zeros():
    got = flash_prefill(*make_states(1, 2, 2, 3, 0), Pattern(SCALE), config=DESCRIPTORS)
    assert (got.out == 0).all()
    assert (got.lse == -torch.inf).all()


def test_no_queries_are_no_launch():
    assert flash_prefill(*make_states(1, 2, 2, 0, 3), Pattern(SCALE)).out.shape == (1, 0, 2, 32)
