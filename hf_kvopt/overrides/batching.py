"""The sugar of `enable(model, batching=True)`: `generate_batch` and transformers' server get our manager."""

from typing import Any

from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.batching.manager import BatchManager
from hf_kvopt.batching.settings import BatchConfig
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
