"""Choose our attention for a model: with `enable`, or for the time of a measurement."""

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from hf_kvopt.attention.register import ATTENTION_NAME
from hf_kvopt.attention.support import attention_obstacle
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.overrides import latents

logger = logging.getLogger(__name__)


@contextmanager
def our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Set `attn_implementation="hf_kvopt"` where the model takes it, and put back what was set before."""
    previous = model.config._attn_implementation
    if previous == ATTENTION_NAME or attention_obstacle(model) is not None:
        yield
        return
    set_attention(model)
    try:
        yield
    finally:
        reset_attention(model, previous)


def set_attention(model: PreTrainedModel) -> None:
    """Set our attention on `model`, and let its latent layers hand on what is cached."""
    model.set_attn_implementation(ATTENTION_NAME)
    latents.install(model)


def reset_attention(model: PreTrainedModel, previous: str) -> None:
    """Undo `set_attention`: put back the attention called `previous`; a no-op where it is still set."""
    latents.uninstall(model)
    if model.config._attn_implementation != previous:
        model.set_attn_implementation(previous)


def takes_attention(model: PreTrainedModel, wanted: bool | None, is_all: bool) -> bool:
    """Return whether to set our attention; a user is told once where the model does not take it, or refused.

    Args:
        wanted: what the user said, None for nothing.
        is_all: whether nothing else would change.
    """
    obstacle = None if wanted is False else attention_obstacle(model)
    if obstacle is None:
        return wanted is not False
    if wanted or is_all:
        raise UnsupportedModel(
            f"{type(model).__name__} {obstacle}: got {'attention=True' if wanted else 'cache=None'}; call "
            "enable(model), which takes the model's own attention with this cache"
        )
    _say_once(type(model).__name__, obstacle)
    return False


@functools.cache
def _say_once(name: str, obstacle: str) -> None:
    logger.warning("%s %s: enable takes the model's own attention with this cache", name, obstacle)
