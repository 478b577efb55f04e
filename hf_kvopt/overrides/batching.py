"""The sugar of `enable(model, batching=True)`: `generate_batch` and transformers' server get our manager."""

from typing import Any

from transformers import PreTrainedModel
from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.batching.manager import BatchManager
from hf_kvopt.batching.requirements import require_packable
from hf_kvopt.batching.settings import BatchConfig
from hf_kvopt.overrides.cache_maker import LAYER_OPTIONS
from hf_kvopt.overrides.instance import InstanceOverride


class ManagerMaker(InstanceOverride):
    """Instead of `init_continuous_batching`: a manager over our blocks and formats.

    transformers' own settings of blocks and kernels are for its own cache, and mean nothing here.
    """

    def __init__(self, model: Any, config: BatchConfig) -> None:
        super().__init__(model)
        self.config = config

    def __call__(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config: Any = None,
        workload_hints: Any = None,
        **_: Any,
    ) -> BatchManager:
        model = self.module
        kept = getattr(model, compat.KEPT_MANAGER, None)
        if isinstance(kept, BatchManager) and kept.config == self.config:
            kept.generation_config = generation_config or model.generation_config
            return kept
        wants_logprobs = bool(getattr(continuous_batching_config, "return_logprobs", False))
        return BatchManager(model, self.config, generation_config, wants_logprobs)


def drop_manager(model: Any) -> None:
    """Give back what a manager that was kept between sessions holds."""
    kept = getattr(model, compat.KEPT_MANAGER, None)
    if isinstance(kept, BatchManager):
        kept.destroy()
        delattr(model, compat.KEPT_MANAGER)


def batch_config_of(
    model: PreTrainedModel,
    cache: str | None,
    batching: bool | BatchConfig,
    options: dict[str, Any],
    draft: Any,
    tiers: dict[str, Any],
) -> BatchConfig | None:
    """Return how `model` is batched, checked; None where it is not."""
    if batching is False:
        return None
    if cache is None:
        raise ValueError("batching needs a cache of this library: got cache=None; pass cache='paged'")
    require_packable(model)
    if isinstance(batching, BatchConfig):
        if batching.cache != cache or options or tiers:
            raise ValueError(
                f"a BatchConfig names the cache and its options itself: got cache={cache!r} and options "
                f"{sorted(options | tiers)} beside one with cache={batching.cache!r}; name them once"
            )
        return batching
    wrong = sorted(set(options) - {"max_tokens", "block_size", *LAYER_OPTIONS})
    if wrong:
        raise TypeError(f"batching takes max_tokens, block_size and the formats of layers: got {wrong} too")
    return BatchConfig(cache=cache, draft=draft, **options, **tiers)
