"""How much of a dense mask is padding on the left."""

import pytest
import torch

from hf_kvopt.attention.eviction import _padding_of


def causal(q_len, kv_len):
    return torch.ones(q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)


@pytest.mark.parametrize("pads", range(6))
@pytest.mark.parametrize("sees_itself", [False, True])
@pytest.mark.parametrize("q_len", [3, 8])
def test_padding_may_see_itself_or_nothing(pads, sees_itself, q_len):
    mask = causal(8, 8)
    mask[:, :pads] = False
    if sees_itself:
        mask |= torch.eye(8, dtype=torch.bool)
    mask = mask[8 - q_len :]
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    assert _padding_of(mask[None, None], 2) == [pads, pads]
    assert _padding_of(added[None, None].expand(2, 1, -1, -1), 2) == [pads, pads]


def test_a_window_is_no_padding():
    mask = causal(8, 8) & ~causal(8, 8).tril(-3)
    assert _padding_of(mask[None, None], 1) == [0]


def test_an_image_that_later_tokens_see_is_no_padding():
    mask = causal(8, 8)
    mask[:4, :4] = True
    assert _padding_of(mask[None, None], 1) == [0]
