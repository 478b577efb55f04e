"""A side of a comparison: a cache and an attention, written `cache+attention`, such as `paged+hf_kvopt`."""

import argparse
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from types import MappingProxyType
from typing import NamedTuple

import torch
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel, QuantizedCache, StaticCache

import hf_kvopt
from evals._common.cli import BadArgumentError

CacheFactory = Callable[[PreTrainedModel, int], Cache]
FORMATS = tuple(name for name, format in hf_kvopt.KV_FORMATS.items() if not format.is_native)
"""Formats of `QuantizedPagedCache`, as the library has them."""
_EIGHT_BITS, _FOUR_BITS, _FEWER_BITS = 0.1, 0.3, 0.5


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

    kind = hf_kvopt.KV_FORMATS[format]
    planes = (kind.k, kind.v) if kind.sealed is None else kind.sealed.planes
    bits = min(half.bits or 16 for half in planes)
    loss = _EIGHT_BITS if bits >= 8 else _FOUR_BITS if bits >= 4 else _FEWER_BITS
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
        **{name: _quantized(name) for name in FORMATS},
        **{f"{name}_exact": _quantized(name, exact_prefill=True) for name in FORMATS},
        "transformers_fp8": _of_transformers("fp8"),
        "transformers_quanto": _of_transformers("quanto"),
        # Groups along the last axis of the states: hqq supports no other for a cache.
        "transformers_hqq": _of_transformers("hqq", axis_key=1, axis_value=1),
        "transformers_hqq8": _of_transformers("hqq", axis_key=1, axis_value=1, nbits=8),
    }
)


# Caches of transformers that lose something, and the package that each needs.
_PEER = "transformers_"
_PEERS = {"fp8": None, "quanto": "optimum.quanto", "hqq": "hqq", "hqq8": "hqq"}


def lossy_sides() -> tuple[str, ...]:
    """Return all formats of this library, and the quantized caches of transformers that can be made here."""
    peers = [name for name, needed in _PEERS.items() if needed is None or _is_installed(needed)]
    return (*(f"{name}+{hf_kvopt.ATTENTION_NAME}" for name in FORMATS), *(f"{_PEER}{n}+sdpa" for n in peers))


def _is_installed(module: str) -> bool:
    package = module.partition(".")[0]
    return find_spec(package) is not None and find_spec(module) is not None


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


@torch.inference_mode()
def accepted_sides(model: PreTrainedModel, sides: Sequence[Side]) -> list[Side]:
    """Return the sides without those caches of transformers that refuse this model, which are named on stderr."""
    kept = []
    for side in sides:
        ids = torch.full((1, 2), 3, device=model.device)
        try:
            cache = side.make_cache(model, ids.shape[1])
            if side.cache.startswith(_PEER):
                side.attend(model)(input_ids=ids, **{hf_kvopt.CACHE_KEYWORD: cache}, use_cache=True)
        except BadArgumentError:
            raise
        except Exception as error:  # whatever another library says of a model that it cannot store
            print(f"{side} is left out: it refuses {type(model).__name__}: {error}", file=sys.stderr)
            continue
        kept.append(side)
    return kept


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
