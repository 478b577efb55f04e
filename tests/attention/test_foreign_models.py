"""Models that were not written for a named attention: eager's logits or an exception, never a wrong token."""

import pytest
import torch

from hf_kvopt import ATTENTION_NAME, CACHE_KEYWORD, PagedCache
from hf_kvopt.errors import KVOptError
from tests.attention.models import assert_equal, caches, case_named, from_config, prompts
from tests.models.tiny import build

# They never look up an attention by its name, or know eager's additive masks alone.
NAMES = [
    "bloom", "falcon", "gptj", "gpt_neo", "mpt", "codegen", "xglm", "gpt_neox_japanese", "cpmant", "openai-gpt",
    "rembert", "roformer", "megatron-bert", "big_bird", "bigbird_pegasus", "git", "deepseek_v4", "hy_v4", "imagegpt",
]  # fmt: skip
MASKS = {
    "no padding": None,
    "left": [[1] * 12, [0] * 5 + [1] * 7],
    "right": [[1] * 12, [1] * 7 + [0] * 5],
}


def known(name):
    try:
        return case_named(name) is not None
    except StopIteration:
        return False


@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", [name for name in NAMES if known(name)])
@torch.no_grad()
def test_a_model_without_the_interface_is_right_or_refuses(name, rows):
    ids = prompts()
    mask = torch.ones_like(ids) if rows is None else torch.tensor(rows)
    want = build(case_named(name))(input_ids=ids, attention_mask=mask).logits
    try:
        got = from_config(name, ATTENTION_NAME)(input_ids=ids, attention_mask=mask).logits
    except (KeyError, KVOptError):  # old models look attention up in a table of their own
        return
    assert_equal(got, want, mask)


@pytest.mark.parametrize("name", ["bloom", "falcon", "gptj", "gpt_neo", "mpt", "codegen", "xglm"])
@torch.no_grad()
def test_a_model_without_the_interface_steps_right_or_refuses(name):
    ids, mask = prompts(), torch.tensor(MASKS["left"])
    want = build(case_named(name))(input_ids=ids, attention_mask=mask).logits
    try:
        model = from_config(name, ATTENTION_NAME)
        cache = PagedCache(model.config)
        first = model(input_ids=ids[:, :11], attention_mask=mask[:, :11], **{CACHE_KEYWORD: cache}).logits
        last = model(input_ids=ids[:, 11:], attention_mask=mask, **{CACHE_KEYWORD: cache}).logits
    except (KeyError, KVOptError):
        return
    got = torch.cat([first, last], dim=1)
    # Without positions of their own these models count the pads in a step: the row without padding decides.
    assert_equal(got[:1], want[:1])


SELECTING = ["axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4"]
SPLITS = {"one prompt": (24,), "a prompt and steps": (20, 1, 1, 1, 1), "chunks": (10, 9, 5)}


@pytest.mark.parametrize("kind", ["dense", "paged"])
@pytest.mark.parametrize("splits", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("padding", ["no padding", "left", "right", "a hole"])
@pytest.mark.parametrize("name", [name for name in SELECTING if known(name)])
@torch.no_grad()
def test_a_selection_of_keys_is_the_one_that_eager_takes(name, padding, splits, kind):
    model, want_model = from_config(name, ATTENTION_NAME), build(case_named(name))
    ids, mask = prompts(length=24), torch.ones(2, 24, dtype=torch.long)
    mask[1, {"no padding": [], "left": range(7), "right": range(17, 24), "a hole": [9]}[padding]] = 0
    cache, dense, begin = caches(model)[kind], caches(want_model)["dense"], 0
    for length in splits:
        inputs = {"input_ids": ids[:, begin : begin + length], "attention_mask": mask[:, : begin + length]}
        got = model(**inputs, **{CACHE_KEYWORD: cache}).logits
        want = want_model(**inputs, **{CACHE_KEYWORD: dense}).logits
        assert_equal(got, want, mask[:, begin : begin + length])
        begin += length


@torch.no_grad()
def test_a_model_that_selects_blocks_of_keys_is_refused():
    with pytest.raises(KVOptError, match="selects blocks of keys"):
        from_config("minimax_m3_vl_text", ATTENTION_NAME)(input_ids=prompts(length=20))
