"""Settings of the tiers, checked when a store is made: sizes, and a folder that can be written."""

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from hf_kvopt.config import parse_bytes

# The share of the disk's free space that is taken where no limit is given.
_SHARE = 2


@dataclass(frozen=True)
class TierSettings:
    """Tiers that a store keeps below the device.

    Args:
        host_bytes: cap on memory of the host; 0 keeps nothing there.
        disk: folder of files; None writes none.
        disk_bytes: cap on the files in that folder.
    """

    host_bytes: int = 0
    disk: Path | None = None
    disk_bytes: int = 0


def tier_settings(
    host_tier: str | int | None, disk_tier: str | Path | None, disk_limit: str | int | None
) -> TierSettings | None:
    """Return the settings as they were given to `PrefixStore`; None where nothing is kept below the device.

    Raises:
        ValueError: a size that is none, or larger than the machine's memory; a folder that cannot be written; a limit
            without a folder.
        TypeError: a folder that is no path.
    """
    host_bytes = 0 if host_tier is None else parse_bytes(host_tier, "host_tier")
    memory = memory_bytes()
    if host_bytes > memory:
        raise ValueError(
            f"host_tier must fit the machine's memory of {memory / 2**30:.1f} GiB: got {host_tier!r}; name less, such "
            f"as '{max(1, memory // 2**31)}GiB', and keep the rest on a disk with disk_tier=..."
        )
    if disk_tier is None:
        if disk_limit is not None:
            raise ValueError(f"disk_limit caps the files of disk_tier: got {disk_limit!r} without a folder; name one")
        return TierSettings(host_bytes) if host_bytes else None
    if not isinstance(disk_tier, str | Path) or not str(disk_tier):
        raise TypeError(f"disk_tier must be a folder such as '/data/kv': got {disk_tier!r}")
    folder = Path(disk_tier).expanduser()
    _require_writable(folder)
    limit = shutil.disk_usage(folder).free // _SHARE if disk_limit is None else parse_bytes(disk_limit, "disk_limit")
    return TierSettings(host_bytes, folder, limit)


def memory_bytes() -> int:
    """Return the memory of this machine, or of the container that the process runs in where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return min(total, int(text)) if text.isdigit() else total


def _require_writable(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # texts lie there: for this user alone
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"disk_tier must be a folder that can be written: got {str(folder)!r} ({error.strerror or error}); name "
            "another one, or drop disk_tier"
        ) from error
