"""Returns: texts of waiting jobs whose blocks come back from the tiers below the device, while other rows go on.

    look      read what the tiers know of a text           a thread of this file; the job waits, and holds nothing
    take      blocks for it, counted as any others         the engine's thread, which alone takes blocks
    copy      to these blocks                              a thread of this file; the job is `arriving`
    land      the job finds its text known                 the engine's thread

Blocks are counted before a forward, and must be there in it: so threads copy, and never take. A look that fails is told
in the log, and the text is computed anew.
"""

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import NamedTuple
from weakref import WeakKeyDictionary

from hf_kvopt.batching.job import Job
from hf_kvopt.prefix.store import PrefixStore
from hf_kvopt.prefix.tiers.record import Key
from hf_kvopt.prefix.tiers.restore import Restore
from hf_kvopt.prefix.tiers.tiers import Tiers

logger = logging.getLogger(__name__)
_THREADS = 2  # one reads files while the other copies
_LOOKS = 3  # of one text, while what lies on the device of it goes on shrinking


class _Look(NamedTuple):
    """One reading of the tiers."""

    restore: Restore
    done: Future[None]
    number: int  # of looks at this text so far, this one included


class Returns:
    """Texts on their way back to the device, for the jobs of one scheduler.

    Args:
        store: whose blocks they are.
        tiers: of the store.
    """

    def __init__(self, store: PrefixStore, tiers: Tiers) -> None:
        self.store, self.tiers = store, tiers
        self.is_looking = False  # whether a job was passed over as its text was being looked for; reset by the caller
        self.arriving: list[Job] = []
        self._threads = ThreadPoolExecutor(_THREADS, "hf_kvopt returns")
        self._looks: WeakKeyDictionary[Job, _Look] = WeakKeyDictionary()
        self._copies: dict[Job, tuple[Restore, Future[None]]] = {}

    def is_known(self, job: Job, key: Key, num_known: int) -> bool:
        """Tell whether it was found out what the tiers know of a job's text, and begin to find out where it was not.

        Args:
            job: waiting.
            key: what its text is filed under now.
            num_known: its tokens that lie on the device; whoever calls holds the store's lock.
        """
        size = self.store.block_size
        text = job.text[:-1]
        if num_known // size >= len(text) // size:
            return True
        look = self._looks.get(job)
        is_stale = look is None or look.restore.key != key  # else the model changed since
        if look is not None and not is_stale:
            if not look.done.done():
                self.is_looking = True
                return False
            # What was found goes on behind blocks that were let go of since.
            is_stale = num_known // size < look.restore.start and look.number < _LOOKS
        if is_stale:
            restore = Restore(self.tiers, key, text)
            number = 1 if look is None else look.number + 1
            self.is_looking = True
            self._looks[job] = _Look(restore, self._threads.submit(_told, restore.find), number)
        return not is_stale

    def begin(self, job: Job, key: Key) -> bool:
        """Let what was found of a job's text come back; False where it is nothing, or there is no room.

        Whoever calls holds the store's lock, and was told by `is_known` that all was found.
        """
        look = self._looks.pop(job, None)
        if look is None or not look.done.done() or look.restore.key != key or not look.restore.take():
            return False
        self.arriving.append(job)
        self._copies[job] = look.restore, self._threads.submit(_told, look.restore.fill)
        return True

    def num_held(self, job: Job) -> int:
        """Blocks in each block space that are held for an arriving job."""
        return self._copies[job][0].num_held

    def landed(self) -> list[Job]:
        """Return the arriving jobs whose copies ended; their blocks are held until `leave`."""
        return [job for job, (_, copy) in self._copies.items() if copy.done()]

    def leave(self, job: Job) -> None:
        """Let go of what is held for a job that landed; whoever calls holds the store's lock."""
        self._copies.pop(job)[0].leave()
        self.arriving.remove(job)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until one reading or copy ends, or for all copies where no time is given.

        Whoever calls does not hold the store's lock, which the threads take.
        """
        copies = [copy for _, copy in self._copies.values()]
        if seconds is None:
            wait(copies)
        else:
            looks = [look.done for look in self._looks.values() if not look.done.done()]
            wait([*looks, *copies], seconds, FIRST_COMPLETED)

    def close(self) -> None:
        """Wait for the threads, and give the blocks back that they filled."""
        self._looks.clear()
        self._threads.shutdown(wait=True, cancel_futures=True)
        for restore, _ in self._copies.values():
            restore.leave()
        self._copies.clear()
        self.arriving = []


def _told(work: Callable[[], None]) -> None:
    """Run a part of a restore; what goes wrong is logged, and leaves the text to be computed."""
    try:
        work()
    except Exception:
        logger.exception("known text could not be brought back from a tier: it is computed anew")
