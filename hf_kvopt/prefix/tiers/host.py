"""HostTier: blocks of known texts in the memory of the host, the least recently used of which go first."""

import threading
from collections import OrderedDict
from collections.abc import Collection, Sequence

from hf_kvopt.prefix.tiers.record import Key, Record


class HostTier:
    """Records by key and digest, up to `max_bytes`; a record that was handed out stays whole when it is dropped.

    Args:
        max_bytes: cap on the bytes of all records.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.num_bytes = max_bytes, 0
        self._records: OrderedDict[tuple[Key, bytes], Record] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: Key, digest: bytes) -> Record | None:
        """Return a record; None where it is not held."""
        with self._lock:
            return self._records.get((key, digest))

    def put(self, key: Key, digest: bytes, record: Record, path: Collection[bytes] = ()) -> None:
        """Keep a record, whose bytes nobody writes to, as the most recently used one; not where `path` had to go."""
        size = record.data.numel()
        with self._lock:
            known = self._records.pop((key, digest), None)
            if known is not None:
                self.num_bytes -= known.data.numel()
            while self._records and self.num_bytes + size > self.max_bytes:
                oldest = next(iter(self._records))
                if oldest[0] == key and oldest[1] in path:
                    return
                self.num_bytes -= self._records.pop(oldest).data.numel()
            if size <= self.max_bytes:
                self._records[key, digest] = record
                self.num_bytes += size

    def touch(self, key: Key, digests: Sequence[bytes]) -> None:
        """Note a use of records; those named last are the last to go."""
        with self._lock:
            for digest in digests:
                if (key, digest) in self._records:
                    self._records.move_to_end((key, digest))

    def clear(self) -> None:
        """Forget all records."""
        with self._lock:
            self._records.clear()
            self.num_bytes = 0
