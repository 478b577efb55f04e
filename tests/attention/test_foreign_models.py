"""Models that were not written for a named attention: eager's logits or an exception, never a wrong token."""

import pytest
import torch

from hf_kvopt import ATTENTION_NAME, CACHE_KEYWORD, PagedCache
from hf_kvopt.errors import KVOptError
from tests.attention.models import assert_equal, case_named, from_config, prompts
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


@pytest.mark.parametrize("name", ["deepseek_v32", "glm_moe_dsa", "minimax_m3_vl_text"])
@torch.no_grad()
def test_models_that_select_keys_sparsely_are_refused(name):
    if not known(name):
        pytest.skip("a model of later versions")
    with pytest.raises(KVOptError, match="selects keys"):
        from_config(name, ATTENTION_NAME)(input_ids=prompts(length=20))
