"""ForwardLog: which layers each forward reached, for caches that hold states beside keys and values.

    layers       0 states   1 keys   2 states
    a forward    read       written  read           reach 2
    the next     read       written  |              broke off behind layer 1: the states of layer 0 have moved on

States sum up a text: unlike keys they cannot be cut back to where a forward began. A cache of which a forward stopped
half way must begin anew, and this log tells that it has to. A decode step changes states in place, and no cache sees
it: whoever reads a state is taken to change it.
"""

KEYS = "keys"
"""What a layer holds in blocks: all else that it holds cannot be cut back."""
READ = "read"
"""How the names of parts begin that are read, and may be changed in place. Every forward reads all states of a layer,
and does not write all of them by the cache."""


class ForwardLog:
    """Sees every read of states and every write, and tells at the next one whether the forward before was whole.

    Between calls: `last` is the layer that came last, `reach` the last one that any forward came to; both as places in
    the order in which a forward comes to the layers. `ever` are the parts of the layer at `reach` that a forward came
    to.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all forwards."""
        self.last = self.reach = -1
        self.num_whole = 0  # forwards before this one
        self.written: frozenset[tuple[int, str]] = frozenset()  # by this forward, or read
        self.ever: frozenset[str] = frozenset()
        self.is_broken = False
        self._before: tuple[int, int, frozenset[tuple[int, str]]] = (-1, 0, frozenset())

    @property
    def has_only_read(self) -> bool:
        """Return whether this forward has written nothing yet."""
        return all(part.startswith(READ) for _, part in self.written)

    @property
    def is_whole(self) -> bool:
        """Return whether the last forward reached every layer and every part that any did."""
        return not (self.is_broken or self.last < self.reach or self._lacks_parts())

    def begins(self, place: int, part: str = KEYS) -> bool:
        """Return whether `part` of the layer at `place` is the first one of a forward."""
        return not self.written or place < self.last or (place, part) in self.written

    def follows_half(self, place: int, part: str = KEYS) -> bool:
        """Return whether a forward before the one that comes to this part stopped half way."""
        if self.is_broken:
            return True
        begins = bool(self.written) and self.begins(place, part)
        if begins and (self.last < self.reach or self._lacks_parts()):
            return True
        # In the first forward nobody knows yet which layer, and which part of it, is the last.
        is_new = place > self.reach or (place == self.reach and _is_steady(part) and part not in self.ever)
        return is_new and self.num_whole + begins > 0

    def note(self, place: int, part: str = KEYS) -> None:
        """Take note of a write, or of a read of states."""
        if self.begins(place, part):
            self._before = self.last, self.num_whole, self.written
            self.num_whole, self.written = self.num_whole + bool(self.written), frozenset()
        if place > self.reach:
            self.ever = frozenset()
        if place >= self.reach and _is_steady(part):
            self.ever |= {part}
        self.written |= {(place, part)}
        self.last, self.reach = place, max(self.reach, place)

    def take_back(self) -> None:
        """Forget that this forward began: it was refused before it changed anything."""
        self.last, self.num_whole, self.written = self._before
        if not self.written and not self.num_whole:
            self.clear()

    def note_refusal(self) -> None:
        """Take note that the write before was refused, and that the keys that this forward wrote were taken back."""
        if any(part != KEYS for _, part in self.written):
            self.is_broken = True
        elif self.num_whole:
            self.last, self.written = self.reach, frozenset()
        else:
            self.clear()

    def _lacks_parts(self) -> bool:
        return bool(self.ever - {part for place, part in self.written if place == self.reach})


def _is_steady(part: str) -> bool:
    """Return whether every forward comes to a part: states are written by the cache in some, in place in others."""
    return part == KEYS or part.startswith(READ)
