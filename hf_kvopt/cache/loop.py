"""Loop: the order in which a model that passes through some of its layers several times comes to the layers of a cache.

config     0   1 2   3               layers 1 and 2 are passed three times
appended                 4 5   6 7   copies of them, made by the first forward
order      0   1 2   4 5   6 7   3   as a forward writes them
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedConfig

from hf_kvopt import compat


class Loop(NamedTuple):
    """Place of the appended layers in a forward."""

    end: int  # the first layer behind those that are passed several times
    num_layers: int  # that the config names
    num_appended: int

    def place(self, layer_idx: int) -> int:
        """Return how many layers come before a layer in a forward."""
        if layer_idx < self.end:
            return layer_idx
        if layer_idx < self.num_layers:
            return layer_idx + self.num_appended
        return self.end + layer_idx - self.num_layers

    def in_turn(self, layers: Sequence[Any]) -> list[Any]:
        """Return the layers of a cache in the order in which a forward writes them."""
        return [*layers[: self.end], *layers[self.num_layers :], *layers[self.end : self.num_layers]]


def loop_of(config: PreTrainedConfig, num_layers: int) -> Loop | None:
    """Return the loop of a decoder's `config`, or None where each layer is passed once, or nobody knows how often."""
    appended = compat.appended_layers(config)
    return Loop(max(appended) + 1, num_layers, len(appended)) if appended else None
