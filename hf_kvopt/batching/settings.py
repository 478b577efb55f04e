"""Settings of a batcher, and the engine that is made of them."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any

from transformers import PreTrainedModel
from transformers.generation import CompileConfig

from hf_kvopt import compat
from hf_kvopt.batching.engine import Engine
from hf_kvopt.batching.graph import GraphStep
from hf_kvopt.batching.probe import require_equal
from hf_kvopt.batching.requirements import as_prompt, num_positions, require_counts, require_packable
from hf_kvopt.batching.rules import Rules, rules_for
from hf_kvopt.cache.divided import require_followed
from hf_kvopt.config import CacheConfig
from hf_kvopt.errors import nearest
from hf_kvopt.overrides.attention import reset_attention, set_attention
from hf_kvopt.prefix.store import PrefixStore
from hf_kvopt.prefix.tiers.settings import tier_settings
from hf_kvopt.quant import KV_FORMATS, is_pair
from hf_kvopt.quant.policy import PLAIN_BLOCK, LayerName
from hf_kvopt.speculation.drafters.base import Drafter
from hf_kvopt.speculation.speculative import SpeculativeDecoding, speculative

_CACHES = ("paged", *(name for name, fmt in KV_FORMATS.items() if not fmt.is_native))


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Settings of a batcher: how it keeps and shares keys and values, how much it computes a step; see `Batcher`."""

    cache: str = "paged"
    max_tokens: int | str | None = None
    max_rows: int = 64
    prefill_chunk: int = 512
    block_size: int | None = None
    prefix_sharing: bool = True
    skip_layers: Collection[LayerName] = ("sliding",)
    layer_formats: Mapping[LayerName, str] = field(default_factory=lambda: MappingProxyType({}))
    draft: Any = None
    compile: bool | CompileConfig = False
    host_tier: str | int | None = None
    disk_tier: str | Path | None = None
    disk_limit: str | int | None = None

    def __post_init__(self) -> None:
        if self.cache not in _CACHES and not is_pair(self.cache):
            raise ValueError(
                f"unknown cache {self.cache!r}: expected one of {sorted(_CACHES)}{nearest(self.cache, _CACHES)}"
            )
        size = PLAIN_BLOCK if self.block_size is None else self.block_size
        CacheConfig(block_size=size, max_tokens=self.max_tokens)  # refuses what cannot work
        require_counts(max_rows=self.max_rows, prefill_chunk=self.prefill_chunk)
        if not isinstance(self.compile, (bool, CompileConfig)):
            raise TypeError(f"compile must be True, False or a CompileConfig of transformers: got {self.compile!r}")
        # Refuses a folder that cannot be written, and sizes that cannot be.
        tiers = tier_settings(self.host_tier, self.disk_tier, self.disk_limit)
        if tiers is not None and not self.prefix_sharing:
            raise ValueError(
                "host_tier and disk_tier keep texts that can be found again: got prefix_sharing=False; drop it, or them"
            )


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings that are those of a `BatchConfig`, and the others, which are of requests."""
    names = {one.name for one in fields(BatchConfig)}
    own = {name: value for name, value in settings.items() if name in names}
    return own, {name: value for name, value in settings.items() if name not in names}


def _drafter(model: PreTrainedModel, draft: Any) -> Drafter | None:
    """Return what drafts for `model`, checked; None where nothing does."""
    if draft is None:
        return None
    made = draft if isinstance(draft, SpeculativeDecoding) else speculative(draft)
    made.drafter.check(model)
    return made.drafter


class Runtime:
    """A model made ready for packed forwards, and its engine; `close` puts the model back.

    Args:
        model: the model.
        config: the settings.

    Raises:
        UnsupportedModel, ValueError, TypeError: see `require_packable`, `BatchConfig` and `PrefixStore`.
    """

    def __init__(self, model: PreTrainedModel, config: BatchConfig) -> None:
        model = compat.unwrapped(model)
        require_packable(model)
        require_followed(model)
        if model.training:
            raise ValueError("a batcher takes a model in evaluation mode: got one in training mode; call model.eval()")
        self.model, self.config = model, config
        store = PrefixStore(
            model,
            max_tokens=config.max_tokens,
            block_size=config.block_size,
            format=None if config.cache == "paged" else config.cache,
            skip_layers=config.skip_layers,
            layer_formats=config.layer_formats,
            host_tier=config.host_tier,
            disk_tier=config.disk_tier,
            disk_limit=config.disk_limit,
        )
        drafter = _drafter(model, config.draft)
        self.max_positions = num_positions(model)
        self.engine = Engine(model, store, config.max_rows, config.prefill_chunk, config.prefix_sharing, drafter)
        if config.compile is not False:
            chosen = config.compile if isinstance(config.compile, CompileConfig) else CompileConfig()
            self.engine.graph = GraphStep(model, chosen)
        self._previous_attention = set_attention(model)
        self._is_closed = False
        try:
            require_equal(model)
        except BaseException:
            self.close("error")
            raise

    def prompt(self, input_ids: Any) -> list[int]:
        """The tokens of a prompt.

        Raises:
            TypeError, ValueError: see `as_prompt`; or there are more than the model has positions for.
        """
        prompt = as_prompt(self.model, input_ids)
        if self.max_positions is not None and len(prompt) >= self.max_positions:
            raise ValueError(
                f"{type(self.model).__name__} has a table of {self.max_positions:,} positions: got a prompt of "
                f"{len(prompt):,} tokens; shorten it"
            )
        return prompt

    def rules(self, prompt: list[int], **settings: Any) -> Rules:
        """The rules of a request for `prompt`, by settings of `rules_for`, with no more new tokens than there may be.

        Raises:
            ValueError, TypeError: see `rules_for` and `require_room`.
        """
        rules = rules_for(self.model, prompt, **settings)
        return rules._replace(max_new_tokens=self.require_room(len(prompt), rules.max_new_tokens))

    def require_room(self, prompt_len: int, max_new_tokens: int) -> int:
        """Return how many new tokens a prompt may get at most.

        Raises:
            ValueError: the prompt and its new tokens are more than the batcher may ever hold.
        """
        if self.max_positions is not None:
            max_new_tokens = min(max_new_tokens, self.max_positions - prompt_len)
        limit, size = self.engine.store.max_tokens, self.engine.store.block_size
        if limit is None:
            return max_new_tokens
        # The last token is never fed; a last block that a known text shares is copied before it is written.
        blocks, most = -(-(prompt_len + max_new_tokens - 1) // size) + 1, -(-int(limit) // size)
        if blocks > most:
            raise ValueError(
                f"a prompt of {prompt_len:,} tokens with up to {max_new_tokens:,} new ones takes {blocks:,} blocks of "
                f"{size} tokens, one of them to copy a shared block: got max_tokens={limit:,}, which is {most:,} "
                f"blocks; raise max_tokens to {blocks * size:,} or more, or lower max_new_tokens"
            )
        return max_new_tokens

    def close(self, reason: str, error: BaseException | None = None) -> None:
        """End all jobs, give memory back, and let the model be as it was; a no-op the second time."""
        self.engine.close(reason, error)
        if not self._is_closed:
            self._is_closed = True
            reset_attention(self.model, self._previous_attention)
