"""The ways a user can bring the paged cache and its attention to a model, and what comes out of each."""

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, PreTrainedModel

import hf_kvopt
from hf_kvopt.errors import KVOptError
from hf_kvopt.pool.storage import KVPool
from tests.models.cases import Case
from tests.models.inputs import inputs_for
from tests.models.kinds import keeps_keys_and_values
from tests.models.reference import Generated, generate, reference
from tests.models.tiny import build

BLOCK_SIZE = 16
# Float32 noise between two orders of summation, relative to the largest logit.
TOLERANCE = 1e-4


class Outcome(NamedTuple):
    """What a route gave."""

    result: str  # "exact", "refused" with a clear error, "unused" (exact, without our cache), or "wrong"
    detail: str = ""
    num_fallbacks: int = 0  # how often keys or values were gathered for an operation that cannot read blocks


def by_enable(case: Case) -> Outcome:
    """`hf_kvopt.enable(model, cache="paged")`, then plain `generate`; refusals must come from `enable`."""
    return _enabled(case, attention=None)


def by_attention(case: Case) -> Outcome:
    """`hf_kvopt.enable(model, cache="paged", attention=True)`, for models on which it is refused."""
    return _enabled(case, attention=True)


def by_cache_alone(case: Case) -> Outcome:
    """`hf_kvopt.enable(model, cache="paged", attention=False)`: the cache under eager attention."""
    return _enabled(case, attention=False)


def by_construction(case: Case) -> Outcome:
    """`from_pretrained(attn_implementation="hf_kvopt")` and a cache with the configuration."""
    return _refusable(case, lambda: build(case, hf_kvopt.ATTENTION_NAME), with_config=True)


def by_switching(case: Case) -> Outcome:
    """`model.set_attn_implementation("hf_kvopt")` and a cache with the configuration."""

    def switched() -> PreTrainedModel:
        model = build(case)
        model.set_attn_implementation(hf_kvopt.ATTENTION_NAME)
        return model

    return _refusable(case, switched, with_config=True)


def without_config(case: Case) -> Outcome:
    """The attention, and a cache that learns the layers from what they store."""
    return _refusable(case, lambda: build(case, hf_kvopt.ATTENTION_NAME), with_config=False)


def _enabled(case: Case, attention: bool | None) -> Outcome:
    model = build(case)
    try:
        hf_kvopt.enable(model, cache="paged", attention=attention, block_size=BLOCK_SIZE)
    except KVOptError as error:
        return Outcome("refused", str(error))
    used = _spy_on_cache(model)
    got = generate(model, inputs_for(case, model))
    hf_kvopt.disable(model)
    return _compare(case, got, *used)


def _spy_on_cache(model: PreTrainedModel) -> list[Cache]:
    """A list that the caches which `generate` makes are put into (some models do not return what they used)."""
    prepare, made = model._prepare_cache_for_generation, []

    def spy(config: object, model_kwargs: dict[str, object], *args: object, **kwargs: object) -> None:
        prepare(config, model_kwargs, *args, **kwargs)
        made.append(model_kwargs.get(hf_kvopt.CACHE_KEYWORD))

    model._prepare_cache_for_generation = spy
    return made


def _refusable(case: Case, make: Callable[[], PreTrainedModel], with_config: bool) -> Outcome:
    try:
        model = make()
    except KeyError as error:
        # Old models look attention up in a table of their own: transformers' error, which nobody can intercept.
        return Outcome("refused", f"transformers knows no such attention here: {error!r}")
    paged = _caches(case, model, with_config, hf_kvopt.PagedCache, block_size=BLOCK_SIZE)
    try:
        return _compare(case, generate(model, inputs_for(case, model), **{hf_kvopt.CACHE_KEYWORD: paged}), paged)
    except KVOptError as error:
        return Outcome("refused", str(error))
    except (AttributeError, TypeError, ValueError) as error:
        if _takes_no_cache(case):
            return Outcome("refused", f"transformers takes no cache here: {error}")
        raise


@cache
def _takes_no_cache(case: Case) -> bool:
    """Whether transformers' own cache cannot be handed over either."""
    model = build(case)
    try:
        generate(model, inputs_for(case, model), **{hf_kvopt.CACHE_KEYWORD: _caches(case, model, True, DynamicCache)})
    except (AttributeError, TypeError, ValueError):
        return True
    return False


def _caches(case: Case, model: PreTrainedModel, with_config: bool, kind: Callable[..., Cache], **options: int) -> Cache:
    config = model.config.get_text_config(decoder=True) if with_config else None
    caches = [kind(config=config, **options) for _ in range(2)]
    return EncoderDecoderCache(*caches) if case.modality in ("encoder", "speech") else caches[0]


def _compare(case: Case, got: Generated, *caches: Cache) -> Outcome:
    want = reference(case)
    if not torch.equal(got.tokens, want.tokens):
        differs = (got.tokens != want.tokens).flatten(0, -2).any(0)
        return Outcome("wrong", f"tokens differ from position {int(differs.nonzero()[0])} on of {differs.numel()}")
    # Forbidden tokens have a logit of minus infinity in both.
    largest = float(want.logits.nan_to_num(0.0, 0.0, 0.0).abs().max())
    delta = float((got.logits - want.logits).nan_to_num(0.0).abs().max())
    if delta > TOLERANCE * max(1.0, largest):
        return Outcome("wrong", f"logits differ by {delta:.1e}")
    pools = [pool for used in caches for pool in _written(used)]
    result = "exact" if pools or not keeps_keys_and_values(case) else "unused"
    return Outcome(result, "", sum(pool.reads.num_fallbacks for pool in pools))


def _written(used: Cache) -> list[KVPool]:
    """The pools of the layers that hold blocks."""
    if isinstance(used, EncoderDecoderCache):
        return _written(used.self_attention_cache) + _written(used.cross_attention_cache)
    return [pool for layer in getattr(used, "layers", ()) if (pool := getattr(layer, "pool", None)) is not None]
