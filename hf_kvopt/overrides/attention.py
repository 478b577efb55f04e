"""Set our attention on a model for the time of a measurement."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from hf_kvopt.attention.register import ATTENTION_NAME
from hf_kvopt.attention.support import attention_obstacle
from hf_kvopt.overrides import latents


@contextmanager
def our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Set `attn_implementation="hf_kvopt"` where the model takes it, and put back what was set before."""
    previous = model.config._attn_implementation
    if previous == ATTENTION_NAME or attention_obstacle(model) is not None:
        yield
        return
    model.set_attn_implementation(ATTENTION_NAME)
    latents.install(model)
    try:
        yield
    finally:
        latents.uninstall(model)
        model.set_attn_implementation(previous)
