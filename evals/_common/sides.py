"""A side of a comparison: a cache and an attention, written `cache+attention`, such as `paged+hf_kvopt`."""

import argparse
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

import hf_kvopt
from evals._common.cli import BadArgumentError

CacheFactory = Callable[[PreTrainedModel, int], Cache]
_FORMATS = ("int8", "fp8_e4m3", "fp8_e5m2", "k8v4", "int4")
_EIGHT_BITS, _FOUR_BITS = 0.1, 0.3


@dataclass(frozen=True, kw_only=True)
class CacheKind:
    """Factory of an empty cache for a model, given the most tokens that a row will hold."""

    about: str
    make: CacheFactory
    # Limit on how far rounding of stored values may move a logit, as a share of the largest: a few times what random
    # models show. It only tells a broken cache from a coarse one; `evals.perplexity` measures the loss of a format.
    loss: float = 0.0


def _dynamic(model: PreTrainedModel, max_len: int) -> Cache:
    return DynamicCache(config=model.config)


def _static(model: PreTrainedModel, max_len: int) -> Cache:
    return StaticCache(config=model.config, max_cache_len=max_len)


def _paged(model: PreTrainedModel, max_len: int) -> Cache:
    return hf_kvopt.PagedCache(model.config)


def _quantized(format: str, exact_prefill: bool = False) -> CacheKind:
    def make(model: PreTrainedModel, max_len: int) -> Cache:
        return hf_kvopt.QuantizedPagedCache(model.config, format=format, exact_prefill=exact_prefill)

    loss = _FOUR_BITS if format in ("k8v4", "int4") else _EIGHT_BITS
    about = f"QuantizedPagedCache, {format}{', exact_prefill' if exact_prefill else ''}"
    return CacheKind(about=about, make=make, loss=loss)


def _of_transformers(backend: str, **options: int) -> CacheKind:
    def make(model: PreTrainedModel, max_len: int) -> Cache:
        try:
            return QuantizedCache(backend, model.config, **options)
        except (ImportError, ValueError) as error:
            raise BadArgumentError(f"transformers' QuantizedCache({backend!r}) cannot be made: {error}") from error

    loss = _EIGHT_BITS if backend == "fp8" else _FOUR_BITS
    return CacheKind(about=f"transformers QuantizedCache({backend!r})", make=make, loss=loss)


CACHES: Mapping[str, CacheKind] = MappingProxyType(
    {
        "dynamic": CacheKind(about="transformers DynamicCache, grown by torch.cat", make=_dynamic),
        "static": CacheKind(about="transformers StaticCache, allocated for the whole run", make=_static),
        "paged": CacheKind(about="hf_kvopt PagedCache", make=_paged),
        **{name: _quantized(name) for name in _FORMATS},
        **{f"{name}_exact": _quantized(name, exact_prefill=True) for name in _FORMATS},
        "transformers_fp8": _of_transformers("fp8"),
        "transformers_quanto": _of_transformers("quanto"),
        # Groups along the last axis of the states: hqq supports no other for a cache.
        "transformers_hqq": _of_transformers("hqq", axis_key=1, axis_value=1),
    }
)


class Side(NamedTuple):
    """A cache by name (or `module:factory`, called with model and max_len) and an attention by name."""

    cache: str
    attention: str

    def __str__(self) -> str:
        return f"{self.cache}+{self.attention}"

    @property
    def loss(self) -> float:
        """`CacheKind.loss`; 0 for a cache that is not known by name."""
        return CACHES[self.cache].loss if self.cache in CACHES else 0.0

    def make_cache(self, model: PreTrainedModel, max_len: int) -> Cache:
        """Make an empty cache that can hold `max_len` tokens of each row."""
        return _factory(self.cache)(model, max_len)

    def attend(self, model: PreTrainedModel) -> PreTrainedModel:
        """Switch the model to this side's attention, and return it."""
        if model.config._attn_implementation == self.attention:
            return model
        try:
            model.set_attn_implementation(self.attention)
        except (ImportError, ValueError) as error:
            raise BadArgumentError(
                f"{type(model).__name__} cannot take attention {self.attention!r}: {error}"
            ) from error
        if model.config._attn_implementation != self.attention:
            raise BadArgumentError(f"{type(model).__name__} ignores attention {self.attention!r}")
        return model


def add_sides_argument(parser: argparse.ArgumentParser, *default: str) -> None:
    """Add `--sides`, with the caches that can be named."""
    caches = "; ".join(f"{name}: {kind.about}" for name, kind in CACHES.items())
    what = (
        f"cache+attention ... ({' '.join(default)}). Caches are {caches}; or module:factory, called with model, max_len"
    )
    parser.add_argument("--sides", nargs="+", metavar="SIDE", default=list(default), help=what)


def parse_side(text: str) -> Side:
    """Parse `cache+attention`.

    Raises:
        BadArgumentError: another form, or an unknown cache or attention.
    """
    cache, plus, attention = text.rpartition("+")
    if not (cache and plus and attention):
        raise BadArgumentError(f"a side is cache+attention, such as paged+hf_kvopt: got {text!r}")
    _factory(cache)
    known = ["eager", *AttentionInterface().valid_keys()]
    if attention not in known:
        raise BadArgumentError(f"unknown attention {attention!r}: known are {', '.join(sorted(known))}")
    return Side(cache, attention)


def _factory(name: str) -> CacheFactory:
    if name in CACHES:
        return CACHES[name].make
    module, colon, attribute = name.partition(":")
    if not colon:
        raise BadArgumentError(f"unknown cache {name!r}: known are {', '.join(CACHES)}, or module:factory")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise BadArgumentError(f"cannot import cache factory {name!r}: {error}") from error
