"""Rows: the decoding jobs of a batcher, one row each of one ragged cache.

columns    0 1 2 3 4 5 6 7 8 9        rows end together, so that one attention call a layer reads all of them
job a      - - - - a b c d e f        one that joins begins at a later column, and columns that the longest row
job b      p q r s t u v w x y        alone had go when it leaves
"""

from collections.abc import Sequence

from hf_kvopt.batching.job import Job
from hf_kvopt.prefix.batch import BatchCache
from hf_kvopt.prefix.store import PrefixStore


class Rows:
    """Jobs that decode; `jobs[i]` is row i of `cache`, which holds all its tokens but the last.

    Args:
        store: whose blocks the rows lie in.
    """

    def __init__(self, store: PrefixStore) -> None:
        self.store = store
        self.cache: BatchCache = BatchCache(store.blocks)
        self.jobs: list[Job] = []

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row that the cache holds."""
        return [len(job.text) - 1 for job in self.jobs]

    def join(self, job: Job) -> None:
        """Take over a job whose prompt is filled."""
        assert job.cache is not None
        self.cache.join(job.cache)
        job.cache = None
        self.jobs.append(job)

    def leave(self, leaving: Sequence[int]) -> None:
        """Let the rows of these numbers go, with their blocks."""
        if not leaving:
            return
        left = [row for row in range(len(self.jobs)) if row not in set(leaving)]
        self.cache.keep_rows(left)
        self.jobs = [self.jobs[row] for row in left]

    def cut_back(self, num_fed: int) -> None:
        """Take back what a step fed beyond the tokens that were taken, `num_fed` columns for each row."""
        if num_fed > 1:
            self.cache.crop_rows(self.lengths)
            self.cache.close_up()
        self.cache.release_behind()

    def close(self) -> None:
        """Give all blocks back."""
        self.cache.close()
        self.jobs = []
