"""Models give eager's logits through our attention, dense and paged, whatever the mask."""

import pytest
import torch
from transformers import masking_utils
from transformers.cache_utils import EncoderDecoderCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hf_kvopt import ATTENTION_NAME, CACHE_KEYWORD, PagedCache
from hf_kvopt.attention.mask import LazyMask
from tests.attention.models import DECODERS, assert_equal, caches, case_named, pair, prompts
from tests.models.inputs import inputs_for
from tests.models.reference import generate, reference

ALL = pytest.mark.parametrize("name", DECODERS)
SOME = pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss", "deepseek_v3"])
KIND = pytest.mark.parametrize("kind", ["dense", "paged"])

pytestmark = pytest.mark.usefixtures("_no_grad")


@pytest.fixture
def _no_grad():
    with torch.no_grad():
        yield


MASKS = {
    "no padding": None,
    "left": [[1] * 12, [0] * 5 + [1] * 7],
    "left in every row": [[0] * 2 + [1] * 10, [0] * 5 + [1] * 7],
    "right": [[1] * 12, [1] * 7 + [0] * 5],
    "interior": [[1] * 12, [1] * 3 + [0] * 4 + [1] * 5],
    "a row of one token": [[1] * 12, [0] * 11 + [1]],
}


@pytest.mark.smoke
@ALL
@KIND
@pytest.mark.parametrize("rows", MASKS.values(), ids=MASKS)
def test_a_prefill_and_steps_in_pieces_equal_one_forward(name, kind, rows):
    eager, ours = pair(name)
    ids = prompts()
    mask = torch.ones_like(ids) if rows is None else torch.tensor(rows)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    given = {"input_ids": ids} if rows is None else given
    want = eager(**given, use_cache=False).logits
    cache = caches(ours)[kind]
    got = []
    for first, last in ((0, 6), (6, 7), (7, 8), (8, 12)):
        part = {key: x[:, :last] if key == "attention_mask" else x[:, first:last] for key, x in given.items()}
        got.append(ours(**part, **{CACHE_KEYWORD: cache}).logits)
    assert_equal(torch.cat(got, dim=1), want, mask)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "name",
    [*DECODERS, "T5ForConditionalGeneration", "BartForConditionalGeneration", "WhisperForConditionalGeneration"],
)
@KIND
def test_padded_generation_equals_eager(name, kind):
    case, (_, ours) = case_named(name), pair(name)
    cache = caches(ours)[kind]
    if case.modality != "text":
        cache = EncoderDecoderCache(cache, caches(ours)[kind])
    got = generate(ours, inputs_for(case, ours), **{CACHE_KEYWORD: cache})
    assert torch.equal(got.tokens, reference(case).tokens)
    assert_equal(got.logits.transpose(0, 1), reference(case).logits.transpose(0, 1))


@ALL
def test_packed_sequences_do_not_see_each_other(name):
    eager, ours = pair(name)
    ids = prompts(batch=1)
    positions = torch.cat([torch.arange(5), torch.arange(4), torch.arange(3)])[None]
    want = eager(input_ids=ids, position_ids=positions, use_cache=False).logits
    got = ours(input_ids=ids, position_ids=positions, use_cache=False).logits
    assert_equal(got, want)
    alone = ours(input_ids=ids[:, 5:9], use_cache=False).logits
    if name not in ("deepseek_v3", "gpt_oss", "llama4_text"):  # routed experts see the whole batch
        assert_equal(got[:, 5:9], alone)


def tree_mask(num_past: int) -> torch.Tensor:
    """[1, 1, 5, past + 5] bool: two branches of two tokens behind one root."""
    sees = torch.tensor([[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 0, 0, 1, 0], [1, 0, 0, 1, 1]]).bool()
    return torch.cat([torch.ones(5, num_past, dtype=torch.bool), sees], dim=1)[None, None]


def as_float(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def by_layer_type(model, mask):
    kinds = set(getattr(model.config, "layer_types", None) or ())
    return dict.fromkeys(kinds, mask) if "sliding_attention" in kinds else mask


@SOME
@KIND
@pytest.mark.parametrize("is_float", [False, True], ids=["bool", "float"])
def test_a_tree_is_verified_branch_by_branch(name, kind, is_float):
    _, ours = pair(name)
    # Short enough that no window has been left behind.
    past, branch = prompts(batch=1, length=3), prompts(batch=1, length=5, seed=1)
    cache = caches(ours)[kind]
    ours(input_ids=past, **{CACHE_KEYWORD: cache})
    mask = as_float(tree_mask(3)) if is_float else tree_mask(3)
    positions = torch.tensor([[3, 4, 5, 4, 5]])
    mask = by_layer_type(ours, mask)
    got = ours(input_ids=branch, attention_mask=mask, position_ids=positions, **{CACHE_KEYWORD: cache}).logits
    for nodes in ([0, 1, 2], [0, 3, 4]):
        alone = ours(input_ids=torch.cat([past, branch[:, nodes]], dim=1), use_cache=False).logits
        assert_equal(got[:, nodes], alone[:, 3:])


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("is_float", [False, True], ids=["bool", "float"])
def test_a_mask_of_the_user_is_honoured(name, is_float):
    eager, ours = pair(name)
    ids = prompts()
    mask = (torch.rand(2, 1, 12, 12, generator=torch.Generator().manual_seed(3)) < 0.5) | torch.eye(12).bool()
    want = eager(input_ids=ids, attention_mask=by_layer_type(eager, as_float(mask)), use_cache=False).logits
    given = as_float(mask) if is_float else mask
    got = ours(input_ids=ids, attention_mask=by_layer_type(ours, given), use_cache=False).logits
    assert_equal(got, want)
    assert not torch.allclose(got, ours(input_ids=ids, use_cache=False).logits, atol=1e-3)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
@pytest.mark.parametrize("rows", [None, [[1] * 12, [0] * 5 + [1] * 7], [[1] * 12, [1] * 7 + [0] * 5]])
def test_a_decoder_that_is_told_to_look_both_ways_does(name, rows, monkeypatch):
    eager, ours = pair(name)
    ids = prompts()
    before = ours(input_ids=ids, use_cache=False).logits
    mask = None if rows is None else torch.tensor(rows)
    for model in (eager, ours):
        monkeypatch.setattr(model.config, "is_causal", False, raising=False)
    want = eager(input_ids=ids, attention_mask=mask, use_cache=False).logits
    got = ours(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert_equal(got, want, mask)
    assert not torch.allclose(got, before, atol=1e-3)


OVERLAYS = {
    "an image that sees itself": {
        "block_sequence_ids": torch.tensor([[-1] * 3 + [0] * 4 + [-1] * 5, [0] * 2 + [-1] * 6 + [1] * 4])
    },
    "or a function": {"or_mask_function": lambda batch, head, q, kv: (q < 4) & (kv < 4)},
    "and a function": {"and_mask_function": lambda batch, head, q, kv: (kv != 2) | (q == 2)},
}


@pytest.mark.parametrize("overlay", OVERLAYS.values(), ids=OVERLAYS)
@pytest.mark.parametrize("make", ["create_causal_mask", "create_sliding_window_causal_mask"])
def test_patterns_with_something_on_top_equal_eager(make, overlay):
    eager, ours = pair("mistral")
    ids = prompts()
    logits = []
    for model in (eager, ours):
        embeds = model.get_input_embeddings()(ids)
        mask = getattr(masking_utils, make)(model.config, embeds, None, None, **overlay)
        logits.append(model(input_ids=ids, attention_mask=mask, use_cache=False).logits)
    assert_equal(logits[1], logits[0])


@pytest.mark.parametrize("length", [7, 8, 9, 16, 17], ids="{} tokens".format)
@KIND
def test_chunked_attention_equals_eager_at_every_chunk_border(length, kind):
    eager, ours = pair("llama4_text")
    ids = prompts(length=length + 3)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    want = eager(input_ids=ids, attention_mask=mask, use_cache=False).logits
    cache = caches(ours)[kind]
    got = [ours(input_ids=ids[:, :length], attention_mask=mask[:, :length], **{CACHE_KEYWORD: cache}).logits]
    for last in range(length + 1, length + 4):
        step = {"input_ids": ids[:, last - 1 : last], "attention_mask": mask[:, :last]}
        got.append(ours(**step, position_ids=torch.full((2, 1), last - 1), **{CACHE_KEYWORD: cache}).logits)
    assert_equal(torch.cat(got, dim=1), want, mask)


@pytest.mark.parametrize("name", ["BartForConditionalGeneration", "T5ForConditionalGeneration"])
@pytest.mark.parametrize("lengths", [(12, 3), (3, 12), (1, 12), (12, 1)], ids=str)
def test_cross_attention_sees_the_whole_encoder_but_its_padding(name, lengths):
    eager, ours = pair(name)
    encoder_ids, ids = prompts(length=lengths[0]), prompts(length=lengths[1], seed=1)
    mask = torch.ones_like(encoder_ids)
    mask[1, lengths[0] // 2 + 1 :] = 0
    given = {"input_ids": encoder_ids, "attention_mask": mask, "decoder_input_ids": ids}
    want = eager(**given, use_cache=False).logits
    assert_equal(ours(**given, use_cache=False).logits, want)
    cache = EncoderDecoderCache(PagedCache(), PagedCache())
    assert_equal(ours(**given, **{CACHE_KEYWORD: cache}).logits, want)


@pytest.mark.parametrize("name", ["LlavaForConditionalGeneration", "Qwen2VLForConditionalGeneration"])
def test_vision_towers_see_the_whole_image(name):
    eager, ours = pair(name)
    given = inputs_for(case_named(name), ours)
    assert_equal(ours(**given).logits, eager(**given).logits, given["attention_mask"])


def test_attention_weights_are_never_made_up():
    _, ours = pair("llama")
    with pytest.raises(ValueError, match="never forms the weights of all keys"):
        ours(input_ids=prompts(), output_attentions=True, use_cache=False)


@SOME
def test_half_precision_is_near_eager(name):
    eager, ours = (model.to(torch.bfloat16) for model in pair.__wrapped__(name))
    ids, mask = prompts(), torch.tensor(MASKS["left"])
    exact = pair(name)[0](input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    want = eager(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    got = ours(input_ids=ids, attention_mask=mask, **{CACHE_KEYWORD: PagedCache(ours.config)}).logits[mask.bool()]
    assert (got - exact).abs().mean() <= 2 * (want - exact).abs().mean() + 1e-5


@pytest.mark.parametrize("name", DECODERS)
def test_padded_prompts_reach_the_attention_as_patterns(name, monkeypatch):
    # Gemma 2 and GPT-OSS know eager's and flash attention's masks, but not sdpa's.
    _, ours = pair(name)
    seen = []
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping, ATTENTION_NAME, lambda *args, **kwargs: seen.append(args[4]) or stop()
    )

    def stop():
        raise StopAsyncIteration

    with pytest.raises(StopAsyncIteration):
        ours(input_ids=prompts(), attention_mask=torch.tensor(MASKS["left"]))
    assert isinstance(seen[0], LazyMask) or name == "llama4_text"  # chunks are no plain pattern
