"""Steps of optimizers, told to whom they concern: a fused one writes to weights without a trace on the tensors.

torch lets every `Optimizer`, whoever wrote it, call hooks before and after its steps. One pair is installed when the
first prefix store is made, and stays; it does nothing for models that have no store.
"""

import functools
import threading
import weakref
from collections.abc import Set
from typing import Any, Protocol

from torch.optim.optimizer import (
    Optimizer,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

_lock = threading.Lock()


class Concerned(Protocol):
    """Who wants to know of steps."""

    def note_step(self, ids: Set[int]) -> None:
        """An optimizer that holds the parameters of these ids is about to make a step, or has made it."""


def watch(concerned: Concerned) -> None:
    """Tell `concerned` of every step, as long as it lives."""
    with _lock:
        _watching().add(concerned)


@functools.cache
def _watching() -> "weakref.WeakSet[Concerned]":
    # Before as well: a step that breaks off has written to some weights.
    register_optimizer_step_pre_hook(_tell)
    register_optimizer_step_post_hook(_tell)
    return weakref.WeakSet()


def _tell(optimizer: Optimizer, args: Any, kwargs: Any) -> None:
    with _lock:
        concerned = list(_watching())
    if concerned:
        ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for one in concerned:
            one.note_step(ids)
