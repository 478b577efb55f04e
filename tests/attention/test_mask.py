"""A mask said in a few numbers is the mask that transformers' sdpa gets, for every pattern, offset and padding."""

import pytest
import torch
from transformers import LlamaConfig, masking_utils
from transformers.masking_utils import sdpa_mask

from hf_kvopt.attention.mask import LazyMask, Pattern, describe, lazy_mask
from hf_kvopt.errors import CacheStateError, UnsupportedModel
from tests.attention.dense import attend_like

KV_LEN = 9
FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "full": masking_utils.bidirectional_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(4),
    "window of one": masking_utils.sliding_window_causal_mask_function(1),
    "window both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 2])),
    "causal or an image": masking_utils.or_masks(
        masking_utils.causal_mask_function,
        masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, 0, -1, -1, 1, 1, -1, -1, -1, -1]]).expand(2, -1)),
    ),
    "two sequences": masking_utils.packed_sequence_mask_function(torch.tensor([[0] * 5 + [1] * 7]).expand(2, -1)),
    "window and causal the other way round": masking_utils.and_masks(
        masking_utils.causal_mask_function, masking_utils.sliding_window_overlay(4)
    ),
    "three at once": masking_utils.and_masks(
        masking_utils.sliding_window_overlay(4), masking_utils.causal_mask_function, lambda b, h, q, k: k != 3
    ),
    "window or causal": masking_utils.or_masks(
        masking_utils.sliding_window_overlay(4), masking_utils.causal_mask_function
    ),
}
PATTERNS = {
    "causal": Pattern(is_causal=True, window=None),
    "full": Pattern(is_causal=False, window=None),
    "window": Pattern(is_causal=True, window=4),
    "window of one": Pattern(is_causal=True, window=1),
}
PADDINGS = {
    "no padding": None,
    "a mask of ones": [[1] * 12, [1] * 12],
    "left": [[1] * 12, [0] * 3 + [1] * 9],
    "right": [[1] * 12, [1] * 6 + [0] * 6],
    "interior": [[1] * 12, [1, 1, 0, 0] + [1] * 8],
    "both sides": [[0] * 2 + [1] * 8 + [0] * 2, [1] * 12],
    "a row of padding": [[1] * 12, [0] * 12],
    "padding alone": [[0] * 12, [0] * 12],
}
# (q_len, q_offset, kv_len, kv_offset): where queries and keys stand.
OFFSETS = {
    "prefill": (9, 0, 9, 0),
    "continued prefill": (3, 6, 9, 0),
    "decoding": (1, 8, 9, 0),
    "behind a window": (2, 10, 9, 3),
    "decoding behind a window": (1, 11, 9, 3),
    "keys of a static cache": (3, 2, 9, 0),
    "first tokens of a static cache": (3, 0, 9, 0),
    "fewer keys than queries": (9, 0, 4, 0),
}


def padding_mask(rows):
    return None if rows is None else torch.tensor(rows, dtype=torch.bool)


def arguments(offsets, function, rows):
    q_len, q_offset, kv_len, kv_offset = offsets
    return {
        "batch_size": 2, "q_length": q_len, "kv_length": kv_len, "q_offset": q_offset, "kv_offset": kv_offset,
        "mask_function": function, "attention_mask": padding_mask(rows), "config": LlamaConfig(),
        "allow_is_causal_skip": True, "dtype": torch.float32, "device": "cpu", "use_vmap": False,
    }  # fmt: skip


def dense(mask):
    return mask.dense() if isinstance(mask, LazyMask) else mask


def everything(**given):
    """What sdpa sees; a skipped mask would say nothing here."""
    return sdpa_mask(**given | {"allow_is_causal_skip": False}).expand(-1, 1, -1, -1)


@pytest.mark.smoke
@pytest.mark.parametrize("rows", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_mask_is_the_one_that_sdpa_gets(function, offsets, rows):
    given = arguments(offsets, function, rows)
    mask = lazy_mask(**given)
    want = everything(**given)
    assert mask.dtype == torch.bool
    assert mask.shape == want.shape
    assert torch.equal(dense(mask), want)


@pytest.mark.parametrize("rows", PADDINGS.values(), ids=PADDINGS)
@pytest.mark.parametrize("offsets", OFFSETS.values(), ids=OFFSETS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_attention_sees_what_the_mask_says(name, offsets, rows):
    given = arguments(offsets, FUNCTIONS[name], rows)
    mask = lazy_mask(**given)
    out, want = attend_like(mask, everything(**given))
    assert torch.allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_plain_patterns_are_known_and_no_others(name):
    assert describe(FUNCTIONS[name]) == PATTERNS.get(name)


def test_every_mask_function_of_transformers_is_told_from_the_others():
    makers = {name: value for name, value in vars(masking_utils).items() if name.endswith("mask_function")}
    known = {"causal_mask_function", "bidirectional_mask_function", "sliding_window_causal_mask_function"}
    ids = torch.zeros(2, 12, dtype=torch.long)
    given = {
        "sliding_window_causal_mask_function": (4,),
        "sliding_window_bidirectional_mask_function": (4,),
        "chunked_causal_mask_function": (4, torch.zeros(2, dtype=torch.long)),
        "padding_mask_function": (ids.bool(),),
        "packed_sequence_mask_function": (ids,),
        "add_offsets_to_mask_function": (masking_utils.causal_mask_function, 0, 0),
    }
    functions = {
        name: make if name in ("causal_mask_function", "bidirectional_mask_function") else make(*given[name])
        for name, make in makers.items()
    }
    assert {name for name, function in functions.items() if describe(function) is not None} == known


@pytest.mark.parametrize(
    "function",
    [lambda b, h, q, k: k <= q, torch.less_equal, print, None],
    ids=["lambda", "torch", "builtin", "nothing"],
)
def test_an_unknown_function_has_no_pattern(function):
    assert describe(function) is None


def test_a_window_that_is_a_tensor_is_not_taken_for_a_number():
    function = masking_utils.sliding_window_causal_mask_function(torch.tensor(4))
    given = arguments(OFFSETS["prefill"], function, None)
    assert torch.equal(dense(lazy_mask(**given)), everything(**given))


STARTS = {
    "no padding": [0, 0],
    "a mask of ones": [0, 0],
    "left": [0, 3],
    "right": None,
    "interior": None,
    "both sides": None,
    "a row of padding": None,
    "padding alone": None,
}


@pytest.mark.parametrize("name", STARTS)
def test_only_left_padding_has_a_start(name):
    rows = PADDINGS[name]
    offsets = (12, 0, 12, 0)
    assert lazy_mask(**arguments(offsets, FUNCTIONS["causal"], rows)).starts == STARTS[name]


TOO_SHORT = [[1] * 5, [0] * 2 + [1] * 3]


@pytest.mark.parametrize("function", ["causal", "window"])
@pytest.mark.parametrize("offsets", ["prefill", "continued prefill", "decoding", "behind a window"])
def test_a_mask_that_does_not_cover_the_new_tokens_is_refused(offsets, function):
    with pytest.raises(CacheStateError, match="attention_mask covers 5 tokens"):
        lazy_mask(**arguments(OFFSETS[offsets], FUNCTIONS[function], TOO_SHORT))


def test_a_mask_over_the_first_tokens_of_a_static_cache_is_enough():
    given = arguments(OFFSETS["keys of a static cache"], FUNCTIONS["causal"], TOO_SHORT)
    assert torch.equal(dense(lazy_mask(**given)), everything(**given))


def test_padding_behind_a_window_is_forgotten():
    mask = lazy_mask(**arguments((1, 11, 9, 3), FUNCTIONS["window"], PADDINGS["left"]))
    assert mask.padding is None
    assert mask.starts == [0, 0]


@pytest.fixture
def mask():
    return lazy_mask(**arguments(OFFSETS["prefill"], FUNCTIONS["causal"], [[1] * 9, [0] * 4 + [1] * 5]))


@pytest.mark.parametrize(
    "compute",
    [
        lambda mask: mask + torch.zeros(9, 9),
        lambda mask: torch.zeros(9, 9) + mask,
        lambda mask: torch.zeros(2, 1, 9, 9).add_(mask),
        lambda mask: 1 - mask,
        lambda mask: 1.0 - mask,
        lambda mask: mask * -1e9,
        lambda mask: -1e9 * mask,
        lambda mask: torch.zeros(9, 9) - mask,
        lambda mask: torch.add(torch.zeros(9, 9), mask, alpha=2.0),
    ],
    ids=[
        "mask + scores", "scores + mask", "scores += mask", "1 - mask", "1.0 - mask", "mask * number", "number * mask",
        "scores - mask", "scores + 2 mask",
    ],
)  # fmt: skip
def test_arithmetic_on_a_mask_is_refused(mask, compute):
    with pytest.raises(UnsupportedModel, match="computes with its attention mask"):
        compute(mask)


@pytest.mark.parametrize(
    "look",
    [
        lambda m: m[:, :, -3:],
        lambda m: m[..., :4],
        lambda m: m[:, 0],
        lambda m: m[0, 0, 5],
        lambda m: ~m,
        lambda m: m.expand(2, 4, 9, 9),
        lambda m: m.transpose(2, 3),
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: torch.zeros(2, 4, 9, 9).masked_fill(~m, -torch.inf),
        lambda m: m & torch.ones(9, dtype=torch.bool),
        lambda m: torch.cat([m, m], dim=-1),
        lambda m: m.all(),
        lambda m: m.contiguous(),
        lambda m: m.clone(),
        lambda m: m.to(torch.bool),
        lambda m: m.detach(),
        lambda m: m.repeat(1, 2, 1, 1),
    ],
    ids=[
        "last queries", "first keys", "one head", "one query", "not", "expand", "transpose", "where", "masked_fill",
        "and", "cat", "all", "contiguous", "clone", "to bool", "detach", "repeat",
    ],
)  # fmt: skip
def test_looking_at_a_mask_gives_what_the_dense_one_gives(mask, look):
    assert torch.equal(dense(look(mask)), look(mask.dense()))


@pytest.mark.parametrize(
    "write",
    [
        lambda m: m.__setitem__((slice(None), slice(None), 0), True),
        lambda m: m.__setitem__(..., torch.ones(2, 1, 9, 9, dtype=torch.bool)),
        lambda m: m.fill_(True),
        lambda m: m.masked_fill_(m.dense(), True),
        lambda m: torch.logical_not(m.dense(), out=m),
    ],
    ids=["item", "all items", "fill", "masked fill", "out"],
)
def test_writing_into_a_mask_is_refused(mask, write):
    with pytest.raises(CacheStateError, match="the write would be lost"):
        write(mask)


def test_a_slice_of_a_mask_is_honoured_by_attention(mask):
    out, want = attend_like(mask[:, :, -3:], mask.dense()[:, :, -3:])
    assert torch.allclose(out, want, atol=1e-5)
