"""ScoredTable: a block table whose prompt shrinks once to the tokens that each KV head of each layer chose.

    after the prompt     slots  0 1 2 3 4 5 6 7 8 9
    head 0 chose                0     3       7 8 9      the next forward moves what was chosen to the first slots,
    head 1 chose                  1 2     5     8 9      head by head, and gives the blocks behind back
    then held            slots  0 1 2 3 4

All heads of a row keep equally many, so lengths and blocks are those of all layers. Which token stands in a slot
differs by head, and nobody asks: keys carry their positions. Layers that seal their blocks keep the states of what they
chose until then, and store them anew: blocks of the prompt were sealed with what is not kept.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_kvopt.errors import CacheStateError, UnsupportedModel
from hf_kvopt.pool import tail
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.evicting import EvictingTable, Eviction
from hf_kvopt.pool.sealed_pool import SealedPool


class ScoredTable(EvictingTable):
    """Table of a policy that scores prompts; see `EvictingTable` for the rest.

    Between calls: `choices` has for each layer that read the prompt one tensor [num_kv_heads, count] a row, the tokens
    to keep, until the next forward carries it out, and `states` of layers that seal, keys and values of these tokens, a
    pair [num_kv_heads, count, head_dim] a row; `floors[i]` is how much of row i cannot be cut, `shrunk[i]` how many
    tokens of it are gone.
    """

    choices: dict[object, list[Tensor]]
    states: dict[object, list[tuple[Tensor, Tensor]]]
    floors: list[int]
    shrunk: list[int]

    def _forget(self) -> None:
        super()._forget()
        self.choices, self.states, self.floors, self.shrunk = {}, {}, [], []

    def has_chosen(self, reads: object) -> bool:
        return self.step_start > 0 or reads in self.choices or any(self.shrunk)

    def choose(self, reads: object, rows: Sequence[Tensor], states: Sequence[tuple[Tensor, Tensor]] | None) -> None:
        self.choices[reads] = list(rows)
        if states is not None:
            self.states[reads] = list(states)
        self.floors, self._plan = [self._num_held(row) for row in range(self.batch_size)], None

    def select(self, indices: Sequence[int]) -> None:
        self.choices = {reads: [rows[i] for i in indices] for reads, rows in self.choices.items()}
        self.states = {reads: [rows[i] for i in indices] for reads, rows in self.states.items()}
        self.floors = [self.floors[i] for i in indices] if self.floors else []
        self.shrunk = [self.shrunk[i] for i in indices] if self.shrunk else []
        super().select(indices)

    def fork(self) -> BlockTable:
        child = super().fork()
        assert isinstance(child, ScoredTable)
        child.choices, child.states = dict(self.choices), dict(self.states)
        child.floors, child.shrunk = list(self.floors), list(self.shrunk)
        return child

    def _num_dropped(self, row: int) -> int:
        return self.shrunk[row] if self.shrunk else 0

    def _counts(self) -> list[int]:
        """Tokens that each row keeps of its prompt, in the layer that chose first."""
        return [chosen.shape[-1] for chosen in next(iter(self.choices.values()))]

    def _planned(self) -> Eviction | None:
        if not self.choices:
            return None
        removed = [self._num_held(row) - count for row, count in enumerate(self._counts())]
        if removed == self.padding():
            return None
        return Eviction(removed, self._columns(removed))

    def _drop(self, eviction: Eviction, pads: Sequence[int]) -> None:
        pools, counts = list(self.allocator.pools), self._counts()
        if {id(pool.reads) for pool in pools} != {id(reads) for reads in self.choices}:
            raise UnsupportedModel(
                f"{self.policy} needs every layer to score the prompt: got {len(pools)} layers, of which "
                f"{len(self.choices)} did; use SinkRecent, or the cache without a policy"
            )
        self.allocator.ensure_free(sum(len(self._shared(i, self._blocks_for(n))) for i, n in enumerate(counts)))
        for row, count in enumerate(counts):
            self._gather(row, count, pads[row], pools)
        self.shrunk = [n - count for n, count in zip(eviction.removed, pads, strict=True)]
        self.floors, self.choices = counts, {}

    def _evict(self, num_tokens: int) -> None:
        super()._evict(num_tokens)
        if self.choices:
            return
        states, self.states = self.states, {}
        longest = max(self._num_held(row) for row in range(self.batch_size)) if states else 0
        if not longest:
            return
        start = self.clock - longest
        tail.plan(self, start, self.clock)
        for pool in list(self.allocator.pools):
            if isinstance(pool, SealedPool):
                k, v = (_aligned(rows, longest) for rows in zip(*states[pool.reads], strict=True))
                pool.write(k, v, self, start, self.clock)

    def _gather(self, row: int, count: int, pads: int, pools: Sequence[object]) -> None:
        """Let the chosen tokens of a row stand in its first `count` slots, in each head those that it chose."""
        size, num_blocks = self.block_size, self._blocks_for(count)
        before = torch.tensor(self.rows[row])
        self._own(row, num_blocks)
        places = torch.arange(count)
        dst = torch.tensor(self.rows[row][:num_blocks])[places // size] * size + places % size if count else places
        for pool in pools if count else ():
            if isinstance(pool, SealedPool):
                continue  # stored anew once the rows are what they become
            tokens = self.choices[pool.reads][row].cpu() + pads  # type: ignore[attr-defined]
            pool.move_heads(before[tokens // size] * size + tokens % size, dst)  # type: ignore[attr-defined]
        self._release_all_but(row, range(num_blocks))

    def _require_held(self, lags: Sequence[int], clock: int) -> None:
        held = [clock - lag - self.base for lag in lags]
        for row, floor in enumerate(self.floors):
            if held[row] < floor:
                raise CacheStateError(
                    f"cannot crop row {row} by {floor - held[row]} tokens of its prompt: got a cache whose "
                    f"{self.policy} chose what to keep by all of it; call cache.reset() and read the text again"
                )
        if clock < 0:
            raise CacheStateError(f"cannot crop to {clock} tokens: got a cache that holds {self.clock}")


def _aligned(rows: Sequence[Tensor], num_columns: int) -> Tensor:
    """Return [batch, num_kv_heads, num_columns, head_dim] of rows [num_kv_heads, count, head_dim] that end together."""
    out = rows[0].new_zeros(len(rows), rows[0].shape[0], num_columns, rows[0].shape[2])
    for states, row in zip(out, rows, strict=True):
        states[:, num_columns - row.shape[1] :] = row
    return out
