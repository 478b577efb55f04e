"""Batches as a function of the step: documents in random order, cut into rows, rows in random order."""

import numpy as np
import torch
from torch import Tensor

# The held-out set consists of library modules: each epoch reads them three times, tests once.
LIBRARY_REPEATS = 3
# Rows of 8,192 come in pairs even if a step has fewer tokens, so that two workers have work.
MIN_ROWS = 2


class BatchStream:
    """Stream of batches over encoded documents; `batch(step, …)` is pure, so that a resumed run continues exactly."""

    def __init__(self, documents: list[list[int]], is_test: list[bool], *, seed: int) -> None:
        self._documents = [np.asarray(ids, dtype=np.int16) for ids in documents]
        repeats = np.where(np.asarray(is_test), 1, LIBRARY_REPEATS)
        self._order = np.repeat(np.arange(len(documents)), repeats)
        self.epoch_tokens = int(sum(len(self._documents[i]) for i in self._order))
        self._seed = seed
        self._rows: dict[tuple[int, int], np.ndarray] = {}

    def batch(self, step: int, row_len: int, batch_tokens: int) -> Tensor:
        """Return int64 ids `[rows, row_len + 1]`, the rows of a step holding `batch_tokens` targets."""
        num_rows = max(MIN_ROWS, batch_tokens // row_len)
        rows_per_epoch = (self.epoch_tokens - 1) // row_len
        picked = []
        for index in range(step * num_rows, (step + 1) * num_rows):
            epoch, row_idx = divmod(index, rows_per_epoch)
            picked.append(self._epoch_rows(epoch, row_len)[row_idx])
        return torch.from_numpy(np.stack(picked).astype(np.int64))

    def _epoch_rows(self, epoch: int, row_len: int) -> np.ndarray:
        """Lay out one epoch: `[rows, row_len + 1]`, where a row's last token is the next row's first."""
        key = (epoch, row_len)
        if key not in self._rows:
            rng = np.random.default_rng([self._seed, epoch, row_len])
            flat = np.concatenate([self._documents[i] for i in rng.permutation(self._order)])
            windows = np.lib.stride_tricks.sliding_window_view(flat, row_len + 1)[::row_len]
            self._rows = {key: windows[rng.permutation(len(windows))]}
        return self._rows[key]


def row_len_at(share_done: float, long_shares: tuple[float, float]) -> int:
    """Return the row length after a share of the run: 512, then 2,048, then 8,192 for the last part."""
    middle, last = long_shares
    if share_done >= 1 - last:
        return 8192
    return 2048 if share_done >= 1 - last - middle else 512
