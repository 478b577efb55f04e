"""merge_state joins parts into what attention over all keys gives."""

import pytest
import torch

from hf_kvopt.kernels.reference.attention import attention_reference, visible_pairs
from hf_kvopt.kernels.triton.merge_state import merge_state, merge_state_reference
from tests.kernels.triton.conftest import assert_lse, make_query


def make_parts(num_splits, batch=2, q_len=2, num_heads=3, v_dim=40):
    out = torch.randn(num_splits, batch, q_len, num_heads, v_dim)
    lse = torch.randn(num_splits, batch, num_heads, q_len) * 5
    return out, lse


@pytest.mark.parametrize("num_splits", [1, 2, 7, 16, 17])
@pytest.mark.parametrize("with_sinks", [False, True], ids=["plain", "sinks"])
def test_merge_equals_the_reference(num_splits, with_sinks):
    out, lse = make_parts(num_splits)
    sinks = torch.randn(3) if with_sinks else None
    ours, theirs = merge_state(out, lse, sinks), merge_state_reference(out, lse, sinks)
    assert torch.allclose(ours.out, theirs.out, atol=1e-5)
    assert_lse(ours.lse, theirs.lse)


def test_parts_that_saw_nothing_are_never_read():
    out, lse = make_parts(5)
    lse[1], lse[3] = -torch.inf, -torch.inf
    expected = merge_state_reference(out, lse)
    out[1], out[3] = torch.nan, torch.nan
    assert torch.allclose(merge_state(out, lse).out, expected.out, atol=1e-5)


def test_rows_that_saw_nothing_are_zero():
    out, lse = make_parts(3)
    lse[:, 1] = -torch.inf
    merged = merge_state(out * torch.nan, lse.where(lse == -torch.inf, torch.nan))
    assert (merged.out[1] == 0).all()
    assert (merged.lse[1] == -torch.inf).all()
    sinks = torch.randn(3)
    with_sinks = merge_state(out, lse, sinks)
    assert (with_sinks.out[1] == 0).all()
    assert torch.allclose(with_sinks.lse[1], sinks[:, None].expand(3, 2))


def test_a_large_spread_of_parts_does_not_overflow():
    out, lse = make_parts(3)
    lse[0], lse[1] = 3e4, -3e4
    assert torch.allclose(merge_state(out, lse).out, out[0], atol=1e-6)


def test_two_halves_of_the_keys_merge_into_attention_over_all():
    q, k, v = make_query(1, 3, 2, 32), torch.randn(1, 3, 20, 32), torch.randn(1, 3, 20, 40)
    seen = visible_pairs(2, torch.tensor([20]), 20)
    whole = attention_reference(q, k, v, seen, 0.2)
    parts = [attention_reference(q, k[:, :, s], v[:, :, s], seen[..., s], 0.2) for s in (slice(0, 12), slice(12, 20))]
    merged = merge_state(torch.stack([p.out for p in parts]), torch.stack([p.lse for p in parts]))
    assert torch.allclose(merged.out, whole.out, atol=1e-5)
    assert_lse(merged.lse, whole.lse)


def test_output_dtype_can_differ_from_the_parts():
    out, lse = make_parts(2)
    assert merge_state(out, lse, dtype=torch.float16).out.dtype == torch.float16
