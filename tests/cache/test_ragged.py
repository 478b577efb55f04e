"""Rows that begin at different columns: left padding without storage, and rows cut to different lengths."""

import copy

import pytest
import torch

from hf_kvopt import CACHE_KEYWORD, CacheStateError, PagedCache
from tests.helpers import KINDS, NEW_TOKENS, eager_tokens, generate, prompt, tiny_model

LENGTHS = (33, 20, 5)


def without_pads(kind: str, lengths: tuple[int, ...]) -> PagedCache:
    """An empty cache whose rows begin where `prompt(*lengths)` has its first tokens."""
    cache = PagedCache(config=tiny_model(kind).config)
    for table in cache._tables.values():
        table.adopt([[] for _ in lengths], [max(lengths) - length for length in lengths], 0)
    return cache


@pytest.mark.parametrize("attention", ["hf_kvopt", "sdpa", "eager"])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_that_is_not_stored_changes_no_token(kind: str, attention: str) -> None:
    cache = without_pads(kind, LENGTHS)
    assert torch.equal(generate(tiny_model(kind, attention), prompt(*LENGTHS), cache), eager_tokens(kind, *LENGTHS))
    assert cache.get_seq_length() == max(LENGTHS) + NEW_TOKENS - 1
    for table in cache._tables.values():
        assert table.lengths == [length + NEW_TOKENS - 1 for length in LENGTHS]
    cache.check_integrity()


@pytest.mark.parametrize("kind", KINDS)
def test_beams_of_padded_rows_share_and_part(kind: str) -> None:
    cache = without_pads(kind, (33, 33, 33, 20, 20, 20))
    options = {"num_beams": 3, "max_new_tokens": 8}
    assert torch.equal(
        generate(tiny_model(kind), prompt(33, 20), cache, **options), eager_tokens(kind, 33, 20, **options)
    )
    cache.check_integrity()


@pytest.mark.parametrize("attention", ["hf_kvopt", "sdpa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kept", [(30, 22, 27), (3, 22, 28)], ids=["one row whole", "all cut"])
def test_rows_cut_to_unlike_lengths_go_on_as_if_padded(kind: str, attention: str, kept: tuple[int, ...]) -> None:
    model, text = tiny_model(kind, attention), prompt(30, 30, 30)["input_ids"]
    cache = PagedCache(config=model.config)
    cache.activate_past_recording()
    with torch.no_grad():
        model(text, **{CACHE_KEYWORD: cache})
    cache.crop_rows(kept)
    columns = cache.get_seq_length()
    assert columns == max(kept)
    new = prompt(6, 6, 6, seed=1)["input_ids"]
    ids, mask = torch.zeros(3, columns + 6, dtype=torch.long), torch.zeros(3, columns + 6, dtype=torch.long)
    for row, length in enumerate(kept):
        ids[row, columns - length :] = torch.cat([text[row, :length], new[row]])
        mask[row, columns - length :] = 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    want = generate(tiny_model(kind, "eager"), inputs)
    for each in (copy.deepcopy(cache), cache):
        assert torch.equal(generate(model, inputs, each), want)
    cache.check_integrity()


def test_columns_without_a_token_are_hidden_whatever_the_mask_says() -> None:
    model = tiny_model()
    ids = prompt(9, 9)["input_ids"]
    cache = without_pads("full", (9, 6))
    with torch.no_grad():
        got = model(ids, **{CACHE_KEYWORD: cache}, position_ids=torch.tensor([range(9), [0, 0, 0, *range(6)]])).logits
        want = model(ids[1:, 3:]).logits
    assert torch.allclose(got[1:, 3:], want, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "text"), [((31, 9), "only be cut"), ((9, -1), "cannot crop")], ids=["longer", "below zero"]
)
def test_lengths_that_cannot_be_are_refused_and_the_cache_stays(lengths: tuple[int, ...], text: str) -> None:
    model, cache = tiny_model("mixed"), PagedCache(config=tiny_model("mixed").config)
    inputs = prompt(30, 30)
    with torch.no_grad():
        model(**inputs, **{CACHE_KEYWORD: cache})
    with pytest.raises(CacheStateError, match=text):
        cache.crop_rows(lengths)
    assert cache.get_seq_length() == 30
    cache.check_integrity()


def test_a_cache_of_fixed_capacity_does_not_cut_single_rows() -> None:
    with pytest.raises(CacheStateError, match="growing cache"):
        PagedCache(max_tokens=64, compileable=True).crop_rows([1])
