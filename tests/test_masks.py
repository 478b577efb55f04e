"""Under every mask each way to use the library gives what plain transformers gives: eager attention, DynamicCache.

    2D    holes, padding on the right or on both sides, of any dtype, over one prompt or over several turns
    4D    bool or added to the scores, for all rows and heads or for each its own, over prompts, chunks and steps

A row without any token has no right answer: eager attention lets it see all columns alike, sdpa none. Nothing of it is
compared, and the other rows must not feel it. A quantized cache is compared with the same cache under eager attention,
which reads it through a plain mask.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    BertConfig,
    BertLMHeadModel,
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedConfig,
    PreTrainedModel,
)

import hf_kvopt
from hf_kvopt import ATTENTION_NAME, CACHE_KEYWORD, PagedCache, QuantizedPagedCache
from tests.helpers import KINDS, NEW_TOKENS, VOCAB, WINDOW, generate, tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTH = 30
# Columns without a token, row by row.
GAPS: dict[str, tuple[int, ...]] = {
    "nothing": (),
    "left": tuple(range(7)),
    "right": tuple(range(24, LENGTH)),
    "both sides": (0, 1, 2, 3, 26, 27, 28, 29),
    "a hole": (5,),
    "holes": (0, 1, 6, 7, 8, 20),
    "a hole before the last token": (LENGTH - 2,),
    "an empty row": tuple(range(LENGTH)),
}


def inputs_of(*rows: str, dtype: torch.dtype = torch.long) -> dict[str, Tensor]:
    """Prompts that repeat themselves, so that there is something to look up, each under a mask of `GAPS`."""
    ids = torch.randint(3, VOCAB, (len(rows), LENGTH), generator=torch.Generator().manual_seed(3))
    ids[:, 10:20] = ids[:, :10]
    mask = torch.ones(len(rows), LENGTH, dtype=torch.long)
    for row, name in enumerate(rows):
        mask[row, list(GAPS[name])] = 0
    return {"input_ids": ids, "attention_mask": mask.to(dtype)}


ALL_AT_ONCE = inputs_of(*GAPS)
CAPACITY = 64  # tokens of a row where it is fixed


def drafts() -> Any:
    return hf_kvopt.speculative("prompt_lookup", fallback=False)


WAYS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # attention, options of enable, of generate
    "our attention": (ATTENTION_NAME, {}, {}),
    "eager": ("eager", {"attention": False}, {}),
    "sdpa": ("sdpa", {"attention": False}, {}),
    "fixed capacity": (ATTENTION_NAME, {"max_tokens": len(GAPS) * CAPACITY, "compileable": True}, {}),
    "sdpa, fixed capacity": (
        "sdpa", {"attention": False, "max_tokens": len(GAPS) * CAPACITY, "compileable": True}, {},
    ),
    "chunks": (ATTENTION_NAME, {}, {"prefill_chunk_size": 8}),
    "beams": (ATTENTION_NAME, {}, {"num_beams": 2}),
    "sharing": (ATTENTION_NAME, {"prefix_sharing": True}, {}),
    "sharing beams": (ATTENTION_NAME, {"prefix_sharing": True}, {"num_beams": 2}),
    "drafts": (ATTENTION_NAME, {"draft": drafts()}, {}),
    "drafts, eager": ("eager", {"draft": drafts(), "attention": False}, {}),
    "drafts, fixed capacity": (
        ATTENTION_NAME, {"draft": drafts(), "max_tokens": len(GAPS) * CAPACITY, "compileable": True}, {},
    ),
    "drafts, sharing": (ATTENTION_NAME, {"draft": drafts(), "prefix_sharing": True}, {}),
}  # fmt: skip


def plain(kind: str, inputs: dict[str, Tensor], **options: Any) -> Any:
    """Generate with eager attention and transformers' own cache."""
    model = tiny_model(kind, "eager")
    return generate(model, inputs, DynamicCache(config=model.config), **options)


@pytest.mark.smoke
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_2d_mask_gives_the_eager_tokens(kind: str, way: str) -> None:
    attention, enabling, options = WAYS[way]
    model = hf_kvopt.enable(tiny_model(kind, attention), **enabling)
    has_token = ALL_AT_ONCE["attention_mask"].bool().any(1)
    recorded = {**options, "return_dict_in_generate": True, "output_logits": True}
    want = plain(kind, ALL_AT_ONCE, **recorded)
    for _ in range(2):
        # A row that has ended leaves the batch where its cache is not handed back.
        assert torch.equal(generate(model, ALL_AT_ONCE, **options)[has_token], want.sequences[has_token])
        got = generate(model, ALL_AT_ONCE, **recorded)
        assert torch.equal(got.sequences[has_token], want.sequences[has_token])
        for mine, theirs in zip(got.logits, want.logits, strict=True):
            rows = has_token.repeat_interleave(len(theirs) // len(has_token))
            assert torch.allclose(mine[rows], theirs[rows], atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.uint8, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("way", ["our attention", "fixed capacity", "chunks", "sharing", "drafts"])
def test_a_2d_mask_may_have_any_dtype(way: str, dtype: torch.dtype) -> None:
    attention, enabling, options = WAYS[way]
    rows = ("left", "a hole", "right")
    model = hf_kvopt.enable(tiny_model("mixed", attention), **enabling)
    got = generate(model, inputs_of(*rows, dtype=dtype), **options)
    assert torch.equal(got, plain("mixed", inputs_of(*rows), **options))


@pytest.mark.parametrize("format", ["int8", "int4/int4", "int4", "k8v4"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_2d_mask_over_quantized_blocks_is_read_as_by_eager(kind: str, format: str) -> None:
    model, want = (
        hf_kvopt.enable(tiny_model(kind, "eager"), cache=format, skip_layers=(), attention=attention)
        for attention in (True, False)
    )
    has_token = ALL_AT_ONCE["attention_mask"].bool().any(1)
    assert torch.equal(generate(model, ALL_AT_ONCE)[has_token], generate(want, ALL_AT_ONCE)[has_token])


CACHES: dict[str, tuple[str, Callable[[PreTrainedConfig], Any]]] = {
    "our attention": (ATTENTION_NAME, PagedCache),
    "our attention, no config": (ATTENTION_NAME, lambda config: PagedCache()),
    "our attention, dense": (ATTENTION_NAME, lambda config: DynamicCache(config=config)),
    "eager": ("eager", PagedCache),
    "sdpa": ("sdpa", PagedCache),
    "fixed capacity": (ATTENTION_NAME, lambda config: PagedCache(config, max_tokens=3 * 80, compileable=True)),
}


@pytest.mark.parametrize("is_whole", [True, False], ids=["the whole text", "its new tokens"])
@pytest.mark.parametrize("gaps", [(), (36, 37, 38)], ids=["no gap", "an answer that ended early"])
@pytest.mark.parametrize("way", [*CACHES, "int8"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_mask_over_all_turns_goes_with_the_new_tokens(
    kind: str, way: str, gaps: tuple[int, ...], is_whole: bool
) -> None:
    def second_turn(attention: str, make: Callable[[PreTrainedConfig], Any]) -> Tensor:
        model = tiny_model(kind, attention)
        cache, first = make(model.config), inputs_of("nothing", "left", "a hole")
        said = generate(model, first, cache)
        text = torch.cat([said, said[:, :9]], dim=1)
        mask = torch.cat([first["attention_mask"], torch.ones(3, text.shape[1] - LENGTH, dtype=torch.long)], dim=1)
        mask[1, list(gaps)] = 0
        fed = text if is_whole else text[:, int(cache.get_seq_length()) :]
        return generate(model, {"input_ids": fed, "attention_mask": mask}, cache)[:, -NEW_TOKENS:]

    if way == "int8":
        got, want = (second_turn(attention, QuantizedPagedCache) for attention in (ATTENTION_NAME, "eager"))
    else:
        got = second_turn(*CACHES[way])
        want = second_turn("eager", lambda config: DynamicCache(config=config))
    assert torch.equal(got, want)


FLOOR = torch.finfo(torch.float32).min
COLUMNS, ROWS, HEADS = 36, 2, 4
CAUSAL = torch.ones(COLUMNS, COLUMNS, dtype=torch.bool).tril()


def drawn(*shape: int) -> Tensor:
    """Hide a third of the past of each query, but never itself."""
    seen = torch.rand(*shape, COLUMNS, COLUMNS, generator=torch.Generator().manual_seed(1)) > 0.3
    return (seen & CAUSAL) | torch.eye(COLUMNS, dtype=torch.bool)


SEEN = {
    "one for all": drawn(1, 1),
    "for each row": drawn(ROWS, 1),
    "for each head": drawn(1, HEADS),
    "for each row and head": drawn(ROWS, HEADS),
    "texts side by side": (torch.arange(COLUMNS)[:, None] // 12 == torch.arange(COLUMNS) // 12)[None, None] & CAUSAL,
    "the next token too": drawn(ROWS, 1) | torch.ones(COLUMNS, COLUMNS, dtype=torch.bool).tril(1),
}
FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda seen: seen,
    "lowest number": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, FLOOR),
    "minus infinity": lambda seen: torch.zeros(seen.shape).masked_fill(~seen, -torch.inf),
    "with a bias": lambda seen: torch.linspace(-1, 1, COLUMNS).expand(seen.shape).masked_fill(~seen, FLOOR),
}
SPLITS = {"one prompt": (COLUMNS,), "a prompt and steps": (31, 1, 1, 1, 1, 1), "chunks": (10, 11, 1, 9, 5)}
IDS = torch.randint(3, VOCAB, (ROWS, COLUMNS), generator=torch.Generator().manual_seed(3))


def cut(mask: Tensor, kind: str, cache: Any, begin: int, end: int) -> Any:
    """Cut out of `mask` what each kind of layer reads in a forward of the columns from `begin` to `end`."""
    hidden = False if mask.dtype == torch.bool else FLOOR

    def part(layer_idx: int, window: int) -> Tensor:
        kv_len, first = cache.get_mask_sizes(end - begin, layer_idx)
        is_near = torch.arange(end) > torch.arange(begin, end)[:, None] - window
        seen = mask[:, :, begin:end, :end].masked_fill(~is_near, hidden)
        # Where the capacity is fixed, columns are read that nothing was written to.
        return F.pad(seen, (0, max(0, first + kv_len - end)), value=hidden)[..., first : first + kv_len]

    if kind == "mixed":
        return {"sliding_attention": part(0, WINDOW), "full_attention": part(1, COLUMNS)}
    return part(0, WINDOW if kind == "sliding" else COLUMNS)


@torch.no_grad()
def logits_of(
    model: PreTrainedModel, make: Callable[[PreTrainedConfig], Any], kind: str, mask: Tensor, lengths: tuple[int, ...]
) -> Tensor:
    """Feed `IDS` piece by piece under `mask`."""
    cache, logits, begin = make(model.config), [], 0
    for end in torch.tensor(lengths).cumsum(0).tolist():
        given = {"input_ids": IDS[:, begin:end], "attention_mask": cut(mask, kind, cache, begin, end)}
        positions = torch.arange(begin, end).expand(ROWS, -1)
        logits.append(model(**given, position_ids=positions, **{CACHE_KEYWORD: cache}).logits)
        begin = end
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("way", "form"),
    # To eager attention a mask is what it adds to the scores, whatever the cache.
    [(way, form) for way in CACHES for form in FORMS if (way, form) != ("eager", "bool")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_4d_mask_is_the_one_that_counts(kind: str, way: str, form: str) -> None:
    attention, make = CACHES[way]
    model, plain_model = tiny_model(kind, attention), tiny_model(kind, "sdpa" if form == "bool" else "eager")
    for what, seen in SEEN.items():
        mask = FORMS[form](seen)
        for how, lengths in SPLITS.items():
            got = logits_of(model, make, kind, mask, lengths)
            want = logits_of(plain_model, lambda config: DynamicCache(config=config), kind, mask, lengths)
            assert torch.allclose(got, want, atol=1e-4), (what, how)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("format", ["int8", "int4/int4", "int4"])
@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_a_4d_mask_over_quantized_blocks_is_read_as_by_eager(kind: str, format: str, form: str) -> None:
    def first_layer(attention: str, mask: Tensor, lengths: tuple[int, ...]) -> Tensor:
        # Its keys and values come from the tokens alone, so that both store the same codes; those of later layers
        # may round the other way where two sums of float32 differ by their order.
        model, states = tiny_model(kind, attention), []
        model.model.layers[0].register_forward_hook(lambda module, args, output: states.append(output))
        logits_of(model, lambda config: QuantizedPagedCache(config, format=format, skip_layers=()), kind, mask, lengths)
        return torch.cat(states, dim=1)

    for what, seen in SEEN.items():
        mask = FORMS[form](seen)
        for how, lengths in SPLITS.items():
            got = first_layer(ATTENTION_NAME, mask, lengths)
            want = first_layer("sdpa" if form == "bool" else "eager", mask, lengths)
            assert torch.allclose(got, want, atol=1e-4), (what, how)


@pytest.mark.parametrize("kind", ["sliding", "mixed"])
@torch.no_grad()
def test_a_4d_mask_over_more_than_a_window_holds_is_refused_and_the_cache_goes_on(kind: str) -> None:
    model, mask = tiny_model(kind), FORMS["lowest number"](SEEN["for each row"])
    want = logits_of(tiny_model(kind, "eager"), lambda config: DynamicCache(config=config), kind, mask, (30, 6))
    cache = PagedCache(model.config)
    model(IDS[:, :30], attention_mask=cut(mask, kind, cache, 0, 30), **{CACHE_KEYWORD: cache})
    for wrong in (mask[:, :, 30:36], mask[:, :, 30:36, :30], mask[:, :, 30:32, 16:], mask[:, :, :, 11:]):
        with pytest.raises((hf_kvopt.CacheStateError, ValueError), match=r"attention_mask (covers|is \[batch)"):
            model(IDS[:, 30:], attention_mask=wrong, **{CACHE_KEYWORD: cache})
    given = {"attention_mask": cut(mask, kind, cache, 30, 36), "position_ids": torch.arange(30, 36)[None]}
    assert torch.allclose(model(IDS[:, 30:], **given, **{CACHE_KEYWORD: cache}).logits, want[:, 30:], atol=1e-4)
    cache.check_integrity()


def typed_models() -> dict[str, PreTrainedModel]:
    """Make models to which the type of a token matters."""
    gpt2 = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.25)
    bert = BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        max_position_embeddings=64, is_decoder=True, initializer_range=0.25,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = {"gpt2": GPT2LMHeadModel._from_config(gpt2, attn_implementation="eager")}
        models["bert"] = BertLMHeadModel._from_config(bert, attn_implementation="eager")
    for model in models.values():
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return {name: model.eval() for name, model in models.items()}


TYPES = {
    "zeros": torch.zeros(2, LENGTH, dtype=torch.long),
    "ones": torch.ones(2, LENGTH, dtype=torch.long),
    "both": (torch.arange(LENGTH) // 7 % 2).expand(2, -1),
}


@pytest.mark.parametrize("way", ["our attention", "eager", "fixed capacity", "chunks", "beams", "sharing"])
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_the_types_of_tokens_count(name: str, way: str) -> None:
    _, enabling, options = WAYS[way]
    model, plain_model = hf_kvopt.enable(typed_models()[name], **enabling), typed_models()[name]
    inputs = inputs_of("left", "a hole")
    for types in (*TYPES.values(), None):
        given = {**inputs, "token_type_ids": types}
        assert torch.equal(generate(model, given, **options), generate(plain_model, given, **options))
