"""What the attention function does with each thing that a model may hand to it."""

import pytest
import torch

from hf_kvopt.attention.forward import attention_forward
from hf_kvopt.attention.mask import lazy_mask
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from tests.attention.dense import Module, make_states, plain_attention

STATES = make_states()
CAUSAL = torch.arange(9) <= torch.arange(6, 9)[:, None]
FULL = torch.ones(3, 9, dtype=torch.bool)


def attend(*args, module=None, states=STATES, **kwargs):
    out, weights = attention_forward(module or Module(), *states, *args, **kwargs)
    assert weights is None
    assert out.is_contiguous()
    return out


def assert_close(out, want):
    assert out.shape == want.shape
    assert torch.allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("name", ["indices", "block_indices"])
def test_sparse_selections_of_keys_are_refused(name):
    with pytest.raises(UnsupportedModel, match=f"Module selects keys by `{name}`"):
        attend(**{name: torch.zeros(2, 3, 4, dtype=torch.long)})
    attend(**{name: None})


@pytest.mark.parametrize(
    ("module_says", "call_says", "seen"),
    [(True, None, CAUSAL), (False, None, FULL), (None, None, CAUSAL), (True, False, FULL), (False, True, CAUSAL)],
    ids=["causal module", "full module", "silent module", "call says full", "call says causal"],
)
def test_without_a_mask_the_call_decides_before_the_module(module_says, call_says, seen):
    out = attend(None, module=Module(module_says), is_causal=call_says)
    assert_close(out, plain_attention(*STATES, seen))


def test_without_a_mask_a_window_counts_only_behind_the_query():
    window = CAUSAL & (torch.arange(9) > torch.arange(6, 9)[:, None] - 3)
    assert_close(attend(None, sliding_window=3), plain_attention(*STATES, window))
    assert_close(attend(None, sliding_window=3, is_causal=False), plain_attention(*STATES, FULL))


def test_a_mask_decides_alone():
    mask = torch.rand(2, 1, 3, 9, generator=torch.Generator().manual_seed(0)) < 0.6
    mask[..., 0] = True
    for options in ({}, {"is_causal": True}, {"is_causal": False}, {"sliding_window": 2}):
        assert_close(attend(mask, **options), plain_attention(*STATES, mask))


@pytest.mark.parametrize("shape", [(2, 9), (2, 3, 9), (9,), (1, 2, 1, 3, 9)], ids=str)
def test_a_mask_without_four_dimensions_is_refused(shape):
    with pytest.raises(ValueError, match=r"must have 4 dimensions .* got \(.*pass a 2D padding mask to the model"):
        attend(torch.ones(shape, dtype=torch.bool))


def test_a_mask_of_integers_is_refused():
    # Ones and zeros that are added to scores shift them by one: a wrong token, not an error.
    with pytest.raises(ValueError, match="bool, or float to add"):
        attend(torch.ones(2, 1, 3, 9, dtype=torch.long))


def test_a_mask_over_more_keys_is_refused_as_by_eager_attention():
    # The keys may be the last ones of those, as behind a window: cut at its end the mask would hide others.
    mask = torch.cat([CAUSAL, torch.ones(3, 4, dtype=torch.bool)], dim=1)[None, None]
    with pytest.raises(CacheStateError, match="attention_mask covers 13 keys: got 9"):
        attend(mask)


@pytest.mark.parametrize("scaling", [None, 0.1, 1.0, 0.0], ids=["none", "small", "one", "zero"])
def test_scaling_is_taken_as_given(scaling):
    q, k, v = STATES
    factor = 1.0 if scaling is None else scaling * 8**0.5
    assert_close(attend(None, scaling=scaling), plain_attention(q * factor, k, v, CAUSAL))


BIASES = {
    "one for all rows": (1, 4, 3, 9),
    "one for each row": (2, 4, 3, 9),
    "one for all heads": (1, 1, 3, 9),
    "longer than the keys": (1, 4, 3, 14),
}


@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
@pytest.mark.parametrize("form", ["none", "bool", "float", "lazy"])
def test_a_position_bias_is_added_under_every_form_of_mask(form, shape):
    bias = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    padding = torch.tensor([[1] * 9, [0] * 4 + [1] * 5]).bool()
    seen = CAUSAL if form == "none" else CAUSAL & padding[:, None, None]
    mask = {
        "none": None,
        "bool": seen[:, None] if form == "none" else seen,
        "float": torch.zeros(2, 1, 3, 9).masked_fill(~seen, torch.finfo(torch.float32).min),
        "lazy": lazy_mask(2, 3, 9, q_offset=6, attention_mask=padding),
    }[form]
    assert_close(attend(mask, position_bias=bias), plain_attention(*STATES, seen, bias[..., -9:]))


@pytest.mark.parametrize("length", [1, 3, 9], ids="{} queries".format)
@pytest.mark.parametrize("name", ["s_aux", "sinks"])
def test_sinks_take_their_share_of_every_query(name, length):
    q, k, v = make_states(lengths=(length, 9))
    sinks = torch.tensor([2.0, -1.0, 0.5, 3.0])
    # A sink is a key of its own whose value is zero.
    keys = torch.arange(9) <= torch.arange(9 - length, 9)[:, None]
    seen = torch.cat([keys, torch.ones(length, 1, dtype=torch.bool)], dim=1)
    k1, v1 = (torch.cat([x, torch.zeros(2, 2, 1, 8)], dim=2) for x in (k, v))
    bias = torch.zeros(1, 4, 1, 10)
    bias[0, :, 0, 9] = sinks
    assert_close(attend(None, states=(q, k, v), **{name: sinks}), plain_attention(q, k1, v1, seen, bias))
    by_query = sinks[None, :, None, None].expand(2, -1, length, -1)
    assert_close(attend(None, states=(q, k, v), **{name: by_query}), plain_attention(q, k1, v1, seen, bias))


def test_sinks_of_each_query_stay_with_it_beside_padding():
    padding = torch.tensor([[1] * 9, [0] * 4 + [1] * 5]).bool()
    states = make_states(lengths=(9, 9))
    sinks = torch.randn(2, 4, 9, 1, generator=torch.Generator().manual_seed(0))
    together = attend(lazy_mask(2, 9, 9, attention_mask=padding), states=states, sinks=sinks)
    alone = attend(None, states=[x[1:, :, 4:] for x in states], sinks=sinks[1:, :, 4:])
    assert_close(together[1:, 4:], alone)


def test_soft_capping_bounds_the_scores():
    q, k, _ = STATES
    scores = q @ k.repeat_interleave(2, dim=1).transpose(2, 3) * 8**-0.5
    capped = 0.5 * torch.tanh(scores / 0.5)
    assert_close(attend(None, softcap=0.5), plain_attention(*STATES, CAUSAL, capped - scores))


def test_unknown_extras_of_a_model_change_nothing():
    extras = {
        "position_ids": torch.zeros(2, 3),
        "use_cache": True,
        "output_router_logits": False,
        "cu_seq_lens_q": None,
    }
    assert torch.equal(attend(None, **extras), attend(None))


def test_dropout_outside_of_training_is_refused():
    with pytest.raises(ValueError, match=r"dropout must be 0 outside of training: got 0\.1; call model\.train\(\)"):
        attend(None, dropout=0.1)


@pytest.mark.parametrize("extras", [{}, {"softcap": 2.0}], ids=["plain", "soft capping"])
@pytest.mark.parametrize("length", [1, 3, 9], ids="{} queries".format)
def test_dropout_in_training_drops_and_keeps_the_mean(length, extras):
    states = make_states(batch=1, lengths=(length, 9))
    torch.manual_seed(0)
    module = Module(training=True)
    exact = attend(None, module=module, states=states, **extras)
    drops = torch.stack([attend(None, module=module, states=states, dropout=0.3, **extras) for _ in range(400)])
    assert not torch.equal(drops[0], drops[1])
    # Five standard errors of the mean.
    assert ((drops.mean(0) - exact).abs() <= 5 * drops.std(0) / 400**0.5 + 1e-5).all()


@pytest.mark.parametrize(
    "extras",
    [{}, {"softcap": 2.0}, {"s_aux": torch.tensor([2.0, -1.0, 0.5, 3.0])}, {"sliding_window": 3}],
    ids=["plain", "soft capping", "sinks", "window"],
)
@pytest.mark.parametrize("padded", [False, True], ids=["no padding", "left padding"])
@pytest.mark.parametrize("length", [1, 3, 9], ids="{} queries".format)
def test_gradients_are_those_of_the_spelled_out_scores(length, padded, extras):
    states = [x.double().requires_grad_() for x in make_states(lengths=(length, 9))]
    padding = torch.tensor([[1] * 9, [0] * 4 + [1] * 5]).bool() if padded else None
    mask = None
    if padded:
        window = extras.get("sliding_window")
        function = {} if window is None else {"mask_function": _window(window)}
        mask = lazy_mask(2, length, 9, q_offset=9 - length, attention_mask=padding, **function)

    def real(*states):
        out, _ = attention_forward(Module(training=True), *states, mask, **extras)
        position = torch.arange(9 - length, 9)
        return out if padding is None else out[padding[:, position]]

    assert torch.autograd.gradcheck(real, states, fast_mode=True)


def _window(size):
    from transformers.masking_utils import sliding_window_causal_mask_function

    return sliding_window_causal_mask_function(size)
