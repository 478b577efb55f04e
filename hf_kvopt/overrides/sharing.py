"""Prefix sharing in plain `generate()`: match the prompt before the first forward, keep new blocks after the call.

    model.generate ─► _Generate ─► generate ─► makes a blank PrefixSharedCache (see enable)
                                      └─► _prefill ─► _Prefill: match and fill, then the model's own prefill of the rest
                      keep ◄── output ◄── decoding, whatever its mode

Methods of the one model instance are overridden; `disable` removes the overrides. A call whose keys and values depend
on more than its tokens (images, embeddings, custom positions) gets a cache that shares nothing.
"""

import copy
import functools
import logging
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import GenerationConfig

from hf_kvopt import compat, ranks
from hf_kvopt.compat.ranks import text_group
from hf_kvopt.errors import CacheStateError
from hf_kvopt.overrides.inputs import prefill
from hf_kvopt.overrides.instance import InstanceOverride
from hf_kvopt.prefix.cache import PrefixSharedCache
from hf_kvopt.prefix.store import PrefixStore

logger = logging.getLogger(__name__)
# Inputs that do not change a token's keys and values; any other input of the model may.
_HARMLESS = (
    *compat.CACHE_NAMES, "attention_mask", "position_ids", "use_cache", "logits_to_keep", "output_attentions",
    "output_hidden_states", "output_router_logits", "output_logits", "return_dict",
)  # fmt: skip


class Sharing:
    """The store of one enabled model, made at its first use, and the caches of running calls."""

    def __init__(self, store: PrefixStore | None, options: dict[str, Any]) -> None:
        self.store, self.options = store, options
        self.running = threading.local()
        self.lock = threading.Lock()

    def store_for(self, model: PreTrainedModel) -> PrefixStore:
        """Return the model's store, making it if needed."""
        with self.lock:
            if self.store is None:
                self.store = PrefixStore(model, **self.options)
            return self.store

    def make_cache(self, model: PreTrainedModel) -> PrefixSharedCache:
        """Return a blank cache, remembered for the `generate` call that runs in this thread."""
        cache = self.store_for(model).new_cache()
        if getattr(self.running, "calls", None):
            self.running.calls[-1].append(cache)
        return cache

    @contextmanager
    def collect(self) -> Iterator[list[PrefixSharedCache]]:
        """Collect the caches that are made inside the block."""
        if not hasattr(self.running, "calls"):
            self.running.calls = []
        made: list[PrefixSharedCache] = []
        self.running.calls.append(made)
        try:
            yield made
        finally:
            self.running.calls.pop()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sharing":
        # A copied model may be trained further: it gets its own store, with the same limits.
        memo[id(self)] = twin = Sharing(None, self.options)
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return Sharing, (None, self.options)


class SharingOverride(InstanceOverride):
    """An override that holds its model's `Sharing`."""

    def __init__(self, model: PreTrainedModel, sharing: Sharing) -> None:
        super().__init__(model)
        self.sharing = sharing

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = super().__deepcopy__(memo)
        twin.sharing = copy.deepcopy(self.sharing, memo)
        return twin


class _Generate(SharingOverride):
    """Calls `GenerationMixin.generate`, or another override of it, and keeps what it computed."""

    def __init__(self, model: PreTrainedModel, sharing: Sharing, inner: InstanceOverride | None) -> None:
        super().__init__(model, sharing)
        self.inner = inner

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        twin = super().__deepcopy__(memo)
        twin.inner = copy.deepcopy(self.inner, memo)
        return twin

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.module
        generate = partial(type(model).generate, model) if self.inner is None else self.inner
        with self.sharing.collect() as made:
            try:
                output = generate(*args, **kwargs)  # type: ignore[operator]
            except BaseException:
                for cache in made:
                    _keep(self.sharing.store_for(model), cache, None, close=True)
                raise
        is_tensor = isinstance(output, Tensor)
        for cache in made:
            # A cache that is returned with the output stays the caller's.
            _keep(self.sharing.store_for(model), cache, output if is_tensor else output.sequences, close=is_tensor)
        return output


class _Prefill(SharingOverride):
    """Fills the cache with known prefixes of the prompts, then reads the rest; replaces `compat.PREFILL`."""

    def __call__(
        self,
        input_ids: Tensor,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        model, cache = self.module, model_kwargs.get(compat.CACHE_KEYWORD)
        chunk_size = generation_config.prefill_chunk_size
        is_blank = isinstance(cache, PrefixSharedCache) and cache.is_blank
        # An early exit skips layers: what it leaves in the cache lacks them, and must not be kept.
        is_whole = isinstance(cache, PrefixSharedCache) and cache.is_whole
        if (
            is_blank
            and is_whole
            and not _returns_prompt(generation_config)
            and _says_all(input_ids, model_kwargs)
            and (chunk_size is None or compat.PREFILL_CHUNKS_GO_ON)
        ):
            assert isinstance(cache, PrefixSharedCache)
            store = self.sharing.store_for(model)
            _require_alike(model, store, input_ids)
            if not store.begin(cache, input_ids, model_kwargs.get("attention_mask"), chunk_size=chunk_size):
                _say_once("rows go through adapters of their own, or something is put before the prompt")
        return prefill(model, input_ids, generation_config, model_kwargs, *args, **kwargs)


def _require_alike(model: PreTrainedModel, store: PrefixStore, input_ids: Tensor) -> None:
    """Raise CacheStateError unless the ranks of a sharded model look the same prompts up in stores that know as much.

    Prompts with a part in common are read before the rest; what a store knows decides how much of them.
    """
    if text_group(model) is None:
        return
    stats, text = store.stats(), zlib.crc32(str(input_ids.tolist()).encode())
    known = f"{stats.num_blocks} blocks and {stats.hits} hits for {stats.rows} prompts"
    said = f"tokens {list(input_ids.shape)} with checksum {text:08x}, {known} before"
    ranks.require_alike(model, "prompts or prefix stores", said)


def install(model: PreTrainedModel, sharing: Sharing, inner: InstanceOverride | None = None) -> None:
    """Override the two methods on this instance; `inner` generates in place of the model's own method."""
    model.__dict__["generate"] = _Generate(model, sharing, inner)
    model.__dict__[compat.PREFILL] = _Prefill(model, sharing)


def prefix_store(model: PreTrainedModel) -> PrefixStore:
    """Return the store behind `enable(model, ..., prefix_sharing=True)`, for `stats()`, `pin()`, `save()`, `clear()`.

    Raises:
        ValueError: prefix sharing is not enabled on this model.
    """
    override = compat.unwrapped(model).__dict__.get("generate")
    if not isinstance(override, _Generate):
        raise ValueError("this model shares no prefixes: call hf_kvopt.enable(model, prefix_sharing=True) first")
    return override.sharing.store_for(override.module)


def _keep(store: PrefixStore, cache: PrefixSharedCache, sequences: Tensor | None, *, close: bool) -> None:
    """Keep what a finished or interrupted call computed; if the model changed meanwhile, keep nothing."""
    if cache.texts is None or cache.is_committed:
        return
    try:
        store.keep(cache, sequences, close=close)
    except CacheStateError as error:
        _say_once(str(error))
        cache.close()


@functools.cache
def _say_once(reason: str) -> None:
    logger.warning("prefixes are not shared: %s", reason)


def _returns_prompt(config: GenerationConfig) -> bool:
    """Return whether the caller gets values of every prompt position, so that all must be computed."""
    return bool(config.output_hidden_states or config.output_attentions)


def _says_all(input_ids: Tensor, model_kwargs: dict[str, Any]) -> bool:
    """Return whether each row's tokens, after left padding, alone determine the keys and values."""
    given = [value for name, value in model_kwargs.items() if name not in _HARMLESS]
    # generate() passes models of images and text an empty dict if there is no image.
    if any(value is not None and not (isinstance(value, dict) and not value) for value in given):
        return False
    mask, positions = model_kwargs.get("attention_mask"), model_kwargs.get("position_ids")
    if input_ids.shape[1] == 0 or positions is None or positions.dim() != 2:
        return False
    if positions.shape[1] != input_ids.shape[1]:
        return False
    if mask is None:
        return bool((positions == torch.arange(input_ids.shape[1], device=input_ids.device)).all())
    if mask.shape != input_ids.shape:
        return False
    # The mask is read as attention reads it, for any dtype; positions counted from other numbers are unusual ones.
    is_token = mask.bool()
    counted = is_token.cumsum(dim=-1)
    # No gap after the first token of a row, and a last token.
    if not bool((is_token == (counted > 0)).all()) or not bool(is_token[:, -1].all()):
        return False
    # Positions at padding do not matter.
    return bool(((positions == counted - 1) | ~is_token).all())
