"""Override behind `enable(model, draft=...)`: plain `model.generate(...)` speculates."""

from typing import Any

from hf_kvopt.overrides.instance import InstanceOverride
from hf_kvopt.speculation.speculative import SpeculativeDecoding

# Arguments of generate(), or fields of its generation config, that choose another way to decode.
_OWN_WAYS = (
    "custom_generate", "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "dola_layers",
)  # fmt: skip


class DraftingGenerate(InstanceOverride):
    """Calls `GenerationMixin.generate` with `custom_generate`, and with the arguments that it would drop.

    A call that asks for a way of its own (`custom_generate`, `assistant_model`, `prompt_lookup_num_tokens`, ...) is
    passed on unchanged.
    """

    def __init__(self, model: Any, speculation: SpeculativeDecoding) -> None:
        super().__init__(model)
        self.speculation = speculation

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.module
        config = kwargs.get("generation_config")
        asked = (kwargs.get(name, getattr(config, name, None)) for name in _OWN_WAYS)
        if any(value is not None and value is not False for value in asked):
            return type(model).generate(model, *args, **kwargs)
        bound = self.speculation.bound(
            streamer=kwargs.pop("streamer", None),
            tokenizer=kwargs.pop("tokenizer", None),
            stop_strings=kwargs.pop("stop_strings", None),
        )
        return type(model).generate(model, *args, custom_generate=bound, **kwargs)
