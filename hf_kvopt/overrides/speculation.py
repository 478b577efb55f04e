"""Override behind `enable(model, draft=...)`: plain `model.generate(...)` speculates."""

from typing import Any

from hf_kvopt.overrides.instance import InstanceOverride
from hf_kvopt.speculation.speculative import SpeculativeDecoding


class DraftingGenerate(InstanceOverride):
    """Calls `GenerationMixin.generate` with `custom_generate`, and with the arguments that it would drop.

    A call with its own `custom_generate` or `assistant_model` is passed on unchanged.
    """

    def __init__(self, model: Any, speculation: SpeculativeDecoding) -> None:
        super().__init__(model)
        self.speculation = speculation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.module
        if kwargs.get("custom_generate") is not None or kwargs.get("assistant_model") is not None:
            return type(model).generate(model, *args, **kwargs)
        bound = self.speculation.bound(
            streamer=kwargs.pop("streamer", None),
            tokenizer=kwargs.pop("tokenizer", None),
            stop_strings=kwargs.pop("stop_strings", None),
        )
        return type(model).generate(model, *args, custom_generate=bound, **kwargs)
