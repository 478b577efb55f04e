"""Choose our attention for a model: for as long as `enable`, a batcher or a measurement uses it."""

import functools
import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from transformers import PreTrainedModel

from hf_kvopt.attention.register import ATTENTION_NAME
from hf_kvopt.attention.support import attention_obstacle
from hf_kvopt.errors import UnsupportedModel
from hf_kvopt.overrides import latents

logger = logging.getLogger(__name__)


class _Use(NamedTuple):
    """Our attention on one model."""

    previous: str  # attention before the first user
    num_users: int


_lock = threading.Lock()
_uses: weakref.WeakKeyDictionary[PreTrainedModel, _Use] = weakref.WeakKeyDictionary()


@contextmanager
def our_attention(model: PreTrainedModel) -> Iterator[None]:
    """Set `attn_implementation="hf_kvopt"` where the model takes it, and put back what was set before."""
    if attention_obstacle(model) is not None:
        yield
        return
    previous = set_attention(model)
    try:
        yield
    finally:
        reset_attention(model, previous)


def set_attention(model: PreTrainedModel) -> str:
    """Set our attention on `model`, and let its latent layers hand on what is cached.

    Returns:
        The attention that was set before the first of those who use ours now; each of them calls `reset_attention`.
    """
    with _lock:
        use = _uses.get(model) or _Use(model.config._attn_implementation, 0)
        if model.config._attn_implementation != ATTENTION_NAME:
            model.set_attn_implementation(ATTENTION_NAME)
        latents.install(model)
        _uses[model] = use._replace(num_users=use.num_users + 1)
        return use.previous


def reset_attention(model: PreTrainedModel, previous: str) -> None:
    """Undo one `set_attention`; the last one puts `previous` back, unless the user has set an attention since."""
    with _lock:
        use = _uses.pop(model, _Use(previous, 1))  # a copy of an enabled model is its own only user
        if use.num_users > 1:
            _uses[model] = use._replace(num_users=use.num_users - 1)
            return
        latents.uninstall(model)
        if ATTENTION_NAME == model.config._attn_implementation != previous:
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
