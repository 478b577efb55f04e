"""Sealed blocks under models: what is generated does not depend on how, or beside whom."""

import pytest
import torch

from hf_kvopt import CACHE_KEYWORD, QuantizedPagedCache, speculative
from tests.cache.sealed import FORMATS
from tests.helpers import NEW_TOKENS, VOCAB, generate, prompt, tiny_model, unpadded
from tests.speculation.drafters import Forest, noisy

by_format = pytest.mark.parametrize("name", FORMATS)
LENGTHS = (75, 52, 9)
SLIDING = {"skip_layers": ()}  # sliding layers are sealed, too
NEW = 40


def cache_for(model, name, **options):
    return QuantizedPagedCache(model.config, format=name, block_size=16, **options)


def tokens(name, text, kind="full", **options):
    """The tokens of plain decoding over rows without padding."""
    model = tiny_model(kind)
    given = {"max_new_tokens": NEW, **options}
    return generate(model, unpadded(text), cache_for(model, name, **SLIDING), **given)


@by_format
@pytest.mark.parametrize("kind", ["full", "sliding", "mixed"])
def test_a_padded_row_gets_the_tokens_that_it_gets_alone(kind, name):
    model, inputs = tiny_model(kind), prompt(*LENGTHS)
    cache = cache_for(model, name, **SLIDING)
    out = generate(model, inputs, cache, max_new_tokens=NEW)
    cache.check_integrity()
    for row, length in enumerate(LENGTHS):
        alone = tokens(name, inputs["input_ids"][row : row + 1, -length:], kind)
        assert torch.equal(out[row, max(LENGTHS) - length :], alone[0])


@by_format
@pytest.mark.parametrize("kind", ["full", "sliding", "mixed"])
def test_logits_do_not_depend_on_chunks(kind, name):
    model, text = tiny_model(kind), prompt(100)["input_ids"]
    found = []
    for chunk in (100, 33, 1):
        cache = cache_for(model, name, **SLIDING)
        with torch.no_grad():
            parts = [model(text[:, i : i + chunk], **{CACHE_KEYWORD: cache}).logits for i in range(0, 100, chunk)]
        found.append(torch.cat(parts, dim=1))
        cache.check_integrity()
    for logits in found[1:]:
        torch.testing.assert_close(logits, found[0], rtol=0, atol=2e-3)


@by_format
def test_a_second_turn_goes_on(name):
    model, text = tiny_model("full"), prompt(61)["input_ids"]
    cache = cache_for(model, name)
    first = generate(model, unpadded(text), cache, max_new_tokens=20)
    more = torch.cat([first, prompt(23, seed=2)["input_ids"]], dim=1)
    again = generate(model, unpadded(more), cache, max_new_tokens=20)
    assert torch.equal(again, tokens(name, more, max_new_tokens=20))


@by_format
def test_beams_are_those_of_a_cache_that_shares_nothing(name):
    model, inputs = tiny_model("full"), prompt(60, 41)
    options = {"num_beams": 3, "max_new_tokens": NEW}
    cache = cache_for(model, name)
    out = generate(model, inputs, cache, **options)
    cache.check_integrity()
    for row, length in enumerate((60, 41)):
        alone = tokens(name, inputs["input_ids"][row : row + 1, -length:], **options)
        assert torch.equal(out[row, 60 - length :], alone[0])


@by_format
@pytest.mark.parametrize("draft", ["model", "prompt_lookup"])
@pytest.mark.parametrize("lengths", [(43,), (43, 30)], ids=["one row", "padded"])
def test_speculation_gives_the_tokens_of_plain_decoding(draft, lengths, name):
    model, inputs = tiny_model("full"), prompt(*lengths)
    plain = generate(model, inputs, cache_for(model, name), max_new_tokens=NEW)
    spec = speculative(noisy() if draft == "model" else draft, gamma=4, fallback=False)
    cache = cache_for(model, name)
    out = generate(model, inputs, cache, max_new_tokens=NEW, custom_generate=spec)
    assert torch.equal(out, plain)
    cache.check_integrity()


@by_format
def test_trees_give_the_tokens_of_plain_decoding(name):
    model, inputs = tiny_model("full"), prompt(43)
    plain = generate(model, inputs, cache_for(model, name), max_new_tokens=NEW)
    spec = speculative(Forest(plain, wrong_at=(50, 51, 70)), gamma=4, num_nodes=12, fallback=False)
    cache = cache_for(model, name)
    assert torch.equal(generate(model, inputs, cache, max_new_tokens=NEW, custom_generate=spec), plain)
    cache.check_integrity()


@by_format
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_any_attention_generates_near_what_ours_does(attention, name):
    model, ours, text = tiny_model("full", attention), tiny_model("full"), prompt(70)["input_ids"]
    found = []
    for one in (model, ours):
        with torch.no_grad():
            cache = cache_for(one, name)
            parts = [one(text[:, i : i + 1], **{CACHE_KEYWORD: cache}).logits for i in range(70)]
        found.append(torch.cat(parts, dim=1))
    # Token by token each reads what its position says, under any attention.
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=2e-3)


@by_format
def test_a_capped_cache_that_is_full_loses_no_block(name):
    model = tiny_model("full")
    cache = cache_for(model, name, max_tokens=96)
    with pytest.raises(Exception, match="max_tokens"):
        generate(model, prompt(70), cache, max_new_tokens=NEW)
    cache.check_integrity()
    cache.reset()
    text = prompt(20)["input_ids"]
    assert torch.equal(
        generate(model, unpadded(text), cache, max_new_tokens=NEW_TOKENS), tokens(name, text, max_new_tokens=NEW_TOKENS)
    )


def test_old_blocks_are_really_read_sealed():
    model, text = tiny_model("full"), prompt(90)["input_ids"]
    with torch.no_grad():
        exact = model(text).logits
        sealed = model(text, **{CACHE_KEYWORD: cache_for(model, "int3")}).logits
    error = (sealed - exact).abs().amax(dim=(0, 2))
    assert error[:48].max() < 1e-3
    assert error[48:].min() > 1e-3
    assert exact.shape[2] == VOCAB


@by_format
def test_layers_that_are_not_sealed_keep_their_tokens_beside_those_that_are(name):
    model, inputs = tiny_model("full"), prompt(*LENGTHS)
    found = []
    for attention in ("hf_kvopt", "sdpa"):
        model.set_attn_implementation(attention)
        cache = cache_for(model, name, skip_layers=("first",))
        with torch.no_grad():
            model(**inputs, **{CACHE_KEYWORD: cache})
        # The layer is native: what it holds is what the model computed, padding or not.
        found.append((cache.layers[0].keys + 0.0)[1, :, -LENGTHS[1] :])
        cache.check_integrity()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-5)
