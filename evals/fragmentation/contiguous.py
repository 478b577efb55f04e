"""Strategies without blocks: one piece of memory for each sequence, or one tensor for a batch."""

from dataclasses import dataclass

from evals.fragmentation.simulate import Use
from evals.fragmentation.workload import MAX_OUTPUT, MAX_PROMPT, Request

_ENTRY_BYTES = 16  # start and size of a piece


@dataclass(eq=False)
class _Sequence:
    request: Request
    start: int
    size: int
    length: int
    left: int


class Contiguous:
    """One piece for each sequence, first fit: of the longest possible length, or of the next power of two, which grows.

    Args:
        pool: number of slots.
        is_max: reserve for the longest sequence at once; else grow by doubling, into a new piece beside the old one.
    """

    def __init__(self, pool: int, is_max: bool) -> None:
        self.pool, self.is_max = pool, is_max
        self.sequences: list[_Sequence] = []

    @property
    def num_running(self) -> int:
        """Number of sequences that generate."""
        return len(self.sequences)

    def admit(self, request: Request) -> bool:
        """Take all samples of a request, each with its own copy of the prompt, or none."""
        taken: list[_Sequence] = []
        for output_len in request.output_lens:
            size = self._size(request.prompt_len + 1)
            start = self._find(size, taken)
            if start is None:
                return False
            taken.append(_Sequence(request, start, size, request.prompt_len, output_len))
        self.sequences += taken
        return True

    def step(self) -> list[Request]:
        """Add one token to each sequence; return the requests, youngest first, preempted where one cannot grow."""
        out: list[Request] = []
        for sequence in list(self.sequences):
            if sequence not in self.sequences:
                continue
            if sequence.length == sequence.size:
                size = self._size(sequence.length + 1)
                while (start := self._find(size, [])) is None:
                    request = self.sequences[-1].request
                    self.sequences = [other for other in self.sequences if other.request is not request]
                    out.append(request)
                    if request is sequence.request:
                        break
                if start is None:
                    continue
                sequence.start, sequence.size = start, size
            sequence.length += 1
            sequence.left -= 1
        self.sequences = [sequence for sequence in self.sequences if sequence.left > 0]
        return out

    def use(self, waiting: Request | None) -> Use:
        """Return the current use; free space is unusable if it would hold the waiting request in one piece."""
        reserved = sum(sequence.size for sequence in self.sequences)
        free, unusable = self.pool - reserved, 0
        if waiting is not None:
            size = self._size(waiting.prompt_len + 1)
            unusable = free if free >= size and self._find(size, []) is None else 0
        used = sum(sequence.length for sequence in self.sequences)
        return Use(used, reserved, unusable, _ENTRY_BYTES * len(self.sequences))

    def _size(self, length: int) -> int:
        return MAX_PROMPT + MAX_OUTPUT if self.is_max else 1 << (length - 1).bit_length()

    def _find(self, size: int, taken: list[_Sequence]) -> int | None:
        end = 0
        for sequence in sorted([*self.sequences, *taken], key=lambda sequence: sequence.start):
            if sequence.start - end >= size:
                return end
            end = sequence.start + sequence.size
        return end if self.pool - end >= size else None


class StaticBatch:
    """transformers' `generate` on a batch: rows padded to the longest, until the last one ends, grown by `torch.cat`.

    Args:
        pool: number of slots.
        num_layers: layers of the model; one layer's old keys and values exist beside its new ones.
    """

    def __init__(self, pool: int, num_layers: int = 32) -> None:
        self.pool, self.num_layers = pool, num_layers
        self.rows: list[_Sequence] = []
        self.columns = 0
        self.is_open = True

    @property
    def num_running(self) -> int:
        """Number of rows of the batch that still generate."""
        return sum(row.left > 0 for row in self.rows)

    def admit(self, request: Request) -> bool:
        """Join the batch before its first step, if all of it fits to its longest end."""
        if not self.is_open:
            return False
        rows = [_Sequence(request, 0, 0, request.prompt_len, output) for output in request.output_lens]
        everyone = [*self.rows, *rows]
        columns = max(row.length for row in everyone)
        # The batch may run to the longest allowed output, as the ends of texts are unknown.
        if self._with_transient(len(everyone) * (columns + MAX_OUTPUT)) > self.pool:
            return False
        self.rows, self.columns = everyone, columns
        return True

    def step(self) -> list[Request]:
        """Add one column; the batch ends with its last row."""
        self.is_open = not self.rows
        self.columns += 1
        for row in self.rows:
            if row.left > 0:
                row.length += 1
                row.left -= 1
        if not self.num_running:
            self.rows, self.columns, self.is_open = [], 0, True
        return []

    def use(self, waiting: Request | None) -> Use:
        """Return the current use; padding and finished rows are reserved, not used."""
        used = sum(row.length for row in self.rows if row.left > 0)
        return Use(used, self._with_transient(len(self.rows) * self.columns), 0, 0)

    def _with_transient(self, slots: int) -> int:
        return slots + slots // self.num_layers
