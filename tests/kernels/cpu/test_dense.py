"""The torch attention path equals a reference that spells out every pair of query and key in float64."""

from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_kvopt.kernels.cpu import dense as cpu
from hf_kvopt.kernels.cpu.dense import attend
from hf_kvopt.kernels.pattern import Pattern


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


HEADS = {"multi-head": (4, 4), "grouped": (6, 2), "multi-query": (4, 1)}
LENGTHS = {"one query": (1, 9), "few queries": (3, 9), "all queries": (9, 9), "one key": (1, 1)}
SIZES = {str(size): (size, size) for size in (64, 80, 96, 128, 192, 256)} | {"192 and 128": (192, 128)}


class States(NamedTuple):
    """What a model hands over: transposed views of [batch, length, heads, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


def make_states(heads=(4, 2), lengths=(3, 9), sizes=(16, 16), batch=2, dtype=torch.float32, seed=0) -> States:
    draw = torch.Generator().manual_seed(seed)
    shapes = (lengths[0], heads[0], sizes[0]), (lengths[1], heads[1], sizes[0]), (lengths[1], heads[1], sizes[1])
    return States(*(torch.randn(batch, *shape, generator=draw).to(dtype).transpose(1, 2) for shape in shapes))


def spelled_out(
    q, k, v, *, scale=None, is_causal=True, window=None, softcap=None, sinks=None, starts=None, mask=None,
    compute=torch.float64,
):  # fmt: skip
    """[batch, q_len, heads, v_dim] of attention in `compute`, and [batch, q_len, heads]: whether any key is seen."""
    (batch, num_heads, q_len, dim), kv_len = q.shape, k.shape[2]
    q, k, v = (x.to(compute) for x in (q, k, v))
    k, v = (x.repeat_interleave(num_heads // x.shape[1], dim=1) for x in (k, v))
    seen = torch.ones(batch, num_heads, q_len, kv_len, dtype=torch.bool)
    position, key = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    if is_causal:
        seen &= key <= position
    if window is not None:
        seen &= key > position - window
    for row, start in enumerate(starts or ()):
        seen[row, :, :, :start] = False
    scores = (q @ k.transpose(2, 3)).to(torch.promote_types(compute, torch.float32)) * (scale or dim**-0.5)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        scores = scores + mask
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.to(scores.dtype)[None, :, None, None].expand(batch, -1, q_len, 1)], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :kv_len]
    return (weights.to(compute) @ v).transpose(1, 2), seen.any(-1).transpose(1, 2)


def check(states: States, atol=1e-5, **options):
    """`attend` agrees wherever a query sees a key; the rest, which is padding, is finite."""
    options.setdefault("is_causal", True)
    options.setdefault("scale", states.q.shape[-1] ** -0.5)
    out = attend(*states, Pattern(**options))
    want, sees = spelled_out(*states, **options)
    assert out.shape == want.shape
    assert out.dtype == states.q.dtype
    assert out.is_contiguous()
    assert out.isfinite().all()
    error = torch.where(sees[..., None], (out - want).abs(), 0.0).max()
    assert error <= atol, f"off by {error:.1e}"


def masks(states: States) -> dict[str, Tensor]:
    """One of each form; every query keeps the last key that it may see at all."""
    (batch, num_heads, q_len, _), kv_len = states.q.shape, states.k.shape[2]
    draw = torch.Generator().manual_seed(1)
    diagonal = torch.arange(kv_len) == torch.arange(kv_len - q_len, kv_len)[:, None]

    def random(*shape):
        return torch.rand(shape, generator=draw) < 0.6

    floats = torch.randn(batch, 1, q_len, kv_len, generator=draw)
    hidden = ~(random(batch, 1, q_len, kv_len) | diagonal)
    return {
        "by key": random(batch, 1, 1, kv_len),
        "by query and key": random(batch, 1, q_len, kv_len) | diagonal,
        "one for all rows": random(1, 1, q_len, kv_len) | diagonal,
        "by head": random(batch, num_heads, q_len, kv_len) | diagonal,
        "additive": floats,
        "additive by head, one for all rows": torch.randn(1, num_heads, q_len, kv_len, generator=draw),
        "additive by key": torch.randn(batch, 1, 1, kv_len, generator=draw),
        "additive with the least value": floats.masked_fill(hidden, torch.finfo(torch.float32).min),
        "additive with minus infinity": floats.masked_fill(hidden, -torch.inf),
        "additive in float64": floats.double(),
    }


EXTRAS = {
    "plain": {},
    "soft capping": {"softcap": 2.0},
    "sinks": {"sinks": torch.tensor([2.0, -1.0, 0.5, 3.0])},
    "all at once": {"softcap": 2.0, "sinks": torch.tensor([2.0, -1.0, 0.5, 3.0]), "scale": 0.4},
}


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS)
def test_every_head_layout_and_size_agrees(heads, sizes, lengths, is_causal):
    check(make_states(heads, lengths, sizes), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)
@pytest.mark.parametrize("window", [1, 2, 8, 9, 10], ids="window of {}".format)
def test_windows_reach_back_exactly_as_far_as_they_say(window, lengths, extras, is_causal):
    check(make_states(lengths=lengths), window=window, is_causal=is_causal, **extras)


STARTS = {
    "no padding": [0, 0, 0],
    "unlike padding": [0, 3, 8],
    "like padding": [4, 4, 4],
    "a row of padding": [0, 9, 2],
    "padding alone": [9, 9, 9],
}


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("lengths", [(1, 9), (3, 9), (9, 9)], ids=["one query", "few queries", "all queries"])
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
def test_left_padding_is_never_seen(starts, lengths, extras, is_causal):
    check(make_states(lengths=lengths, batch=3), starts=starts, is_causal=is_causal, **extras)


@pytest.mark.parametrize("form", masks(make_states()))
@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("lengths", [(1, 9), (3, 9), (9, 9)], ids=["one query", "few queries", "all queries"])
def test_every_form_of_mask_is_honoured(form, lengths, extras):
    states = make_states(lengths=lengths)
    mask = masks(states)[form]
    check(states, mask=mask, is_causal=False, **extras)
    check(states, mask=mask, is_causal=False, **extras | {"window": 4})
    check(states, mask=mask, is_causal=True, **extras)
    check(states, mask=mask, is_causal=True, **extras | {"starts": [0, 5]})


@pytest.mark.smoke
@settings(max_examples=250, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(data=st.data())
def test_any_combination_agrees(data):
    pick = lambda *choices: data.draw(st.sampled_from(choices))  # noqa: E731
    kv_len = pick(1, 2, 7, 16, 17, 40)
    q_len = min(kv_len, pick(1, 2, 16, 17, kv_len))
    batch, heads, sizes = pick(1, 3), pick(*HEADS.values()), pick((16, 16), (24, 16))
    states = make_states(heads, (q_len, kv_len), sizes, batch, seed=data.draw(st.integers(0, 9)))
    options = {
        "is_causal": pick(True, True, False),
        "window": pick(None, None, 1, 3, 16, kv_len),
        "softcap": pick(None, 2.0),
        "sinks": pick(None, torch.linspace(-2, 2, heads[0])),
        "starts": pick(None, [data.draw(st.integers(0, kv_len)) for _ in range(batch)]),
        "mask": pick(None, *masks(states).values()),
    }
    with pytest.MonkeyPatch.context() as patch:
        # The smallest tiles of 16 queries: 40 queries end in the middle of the third.
        patch.setattr(cpu, "_TILE_SCORES", pick(1, cpu._TILE_SCORES))
        check(states, **options)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("num_queries", [15, 16, 17, 33, 48], ids="{} queries".format)
def test_tiles_of_any_remainder_agree(num_queries, extras, monkeypatch):
    monkeypatch.setattr(cpu, "_TILE_SCORES", 1)
    states = make_states(lengths=(num_queries, 50))
    check(states, **extras)
    check(states, window=5, **extras)
    check(states, is_causal=False, **extras)


LAYOUTS = {
    "heads innermost in the pool": (1, 0, 2),
    "heads outermost in the pool": (0, 1, 2),
}


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("lengths", [(1, 9), (3, 9), (9, 9)], ids=["one query", "few queries", "all queries"])
@pytest.mark.parametrize("order", LAYOUTS.values(), ids=LAYOUTS)
def test_rows_read_as_views_of_a_pool_agree(order, lengths, extras):
    # Rows of 9 tokens at slots 16 and 32 of a pool whose other slots hold NaN.
    pools = torch.full((2, 2, 64, 16), torch.nan)
    pools = pools.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3) if order == (1, 0, 2) else pools
    states = make_states(lengths=lengths)
    for pool, x in zip(pools, states[1:], strict=True):
        for row, slot in enumerate((16, 32)):
            pool[:, slot : slot + 9] = x[row]
    rows = [
        pool.as_strided((2, 2, 9, 16), (16 * pool.stride(1), *pool.stride()), pool[:, 16:].storage_offset())
        for pool in pools
    ]
    fused = torch.zeros(2, lengths[0], 4 * 16 + 5)
    q = fused[..., 5:].unflatten(-1, (4, 16)).transpose(1, 2)
    q.copy_(states.q)
    check(States(q, *rows), **extras)
    check(States(q, *rows), starts=[0, 4], **extras)


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
@pytest.mark.parametrize("sizes", [(64, 64), (24, 16)], ids=["like head sizes", "unlike head sizes"])
@pytest.mark.parametrize("lengths", [(1, 65), (7, 65), (65, 65)], ids=["one query", "few queries", "all queries"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_is_as_close_as_plain_torch(dtype, lengths, sizes, extras):
    states = make_states(lengths=lengths, sizes=sizes, dtype=dtype)
    options = {"scale": 0.2, "is_causal": True, **extras}
    out = attend(*states, Pattern(**options))
    want, _ = spelled_out(*states, **options, compute=torch.float32)
    honest, _ = spelled_out(*states, **options, compute=dtype)
    assert out.dtype == dtype
    assert (out - want).abs().max() <= 2 * (honest - want).abs().max() + 1e-5


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_a_float32_mask_that_hides_a_whole_row_leaves_bfloat16_finite(extras):
    # The least float32 overflows to minus infinity in bfloat16, and a row of those is 0 / 0.
    states = make_states(lengths=(4, 4), dtype=torch.bfloat16)
    mask = torch.zeros(1, 1, 4, 4)
    mask[:, :, 0] = torch.finfo(torch.float32).min
    out = attend(*states, Pattern(**{"scale": 0.2, **extras}, is_causal=False, mask=mask))
    assert out.isfinite().all()


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_an_additive_mask_that_hides_a_whole_row_leaves_it_finite(extras):
    # NaN in a row of padding would come back to the real rows as 0 * NaN, one layer later.
    states = make_states(lengths=(4, 4))
    mask = torch.zeros(1, 1, 4, 4)
    mask[:, :, 0] = -torch.inf
    out = attend(*states, Pattern(**{"scale": 0.2, **extras}, is_causal=False, mask=mask))
    assert out.isfinite().all()


@pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
def test_no_query_gives_no_output(extras):
    states = make_states(lengths=(0, 9))
    assert attend(*states, Pattern(**{"scale": 0.2, **extras})).shape == (2, 0, 4, 16)
