"""ForwardLog: which layers each forward reached, for caches that hold states beside keys and values.

    layers       0 states   1 keys   2 states
    a forward    written    written  written        reach 2
    the next     written    written  |              broke off behind layer 1: the states of layer 0 have moved on

States sum up a text: unlike keys they cannot be cut back to where a forward began. A cache of which a forward stopped
half way must begin anew, and this log tells that it has to.
"""

KEYS = "keys"
"""What a layer holds in blocks: all else that it holds cannot be cut back."""


class ForwardLog:
    """Sees every write to a cache, and tells at the next one whether the forward before it reached the last layer.

    Args:
        num_layers: of the cache, as its config names them.

    Between calls: `last` is the layer that was written last, `reach` the last one that any forward wrote.
    """

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.clear()

    def clear(self) -> None:
        """Forget all forwards."""
        self.last = self.reach = -1
        self.num_whole = 0  # forwards before this one
        self.written: frozenset[tuple[int, str]] = frozenset()  # by this forward
        self.is_broken = False

    def begins(self, layer_idx: int, part: str = KEYS) -> bool:
        """Whether a write to `part` of a layer is the first one of a forward."""
        return not self.written or layer_idx < self.last or (layer_idx, part) in self.written

    def follows_half(self, layer_idx: int, part: str = KEYS) -> bool:
        """Whether a forward before the one that makes this write stopped half way."""
        if self.is_broken:
            return True
        begins = bool(self.written) and self.begins(layer_idx, part)
        if begins and self.last < self.reach:
            return True
        # In the first forward nobody knows yet which layer is the last.
        return layer_idx > self.reach and self.num_whole + begins > 0

    def note(self, layer_idx: int, part: str = KEYS) -> None:
        """Take note of a write."""
        if self.written and self.begins(layer_idx, part):
            self.num_whole, self.written = self.num_whole + 1, frozenset()
        self.written |= {(layer_idx, part)}
        self.last, self.reach = layer_idx, max(self.reach, layer_idx)

    def note_refusal(self) -> None:
        """Take note that the write before was refused, and that the keys that this forward wrote were taken back."""
        if any(part != KEYS for _, part in self.written):
            self.is_broken = True
        elif self.num_whole:
            self.last, self.written = self.reach, frozenset()
        else:
            self.clear()
