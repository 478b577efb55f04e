"""DiskTier: blocks of known texts as files, one a block, for this process and for others.

    <folder>/hf_kvopt-1/<model>/<2 letters>/<text>.safetensors
                          │                   └─ SHA-256 of the namespace and of the digest of the block
                          └─ what computed the block: weights, settings, format, versions; see `tiers.naming`

A file is a safetensors file with one tensor, and a manifest in its header as `PrefixStore.save` writes it, with a
SHA-256 of itself and of the tensor. It appears whole or not at all; what a broken machine leaves of one is noticed by
these digests, removed, and computed anew. The files that were used longest ago go first.
"""

import hashlib
import json
import logging
import os
import shutil
import struct
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import save_file

from hf_kvopt.prefix.tiers.record import Record

logger = logging.getLogger(__name__)
VERSION = 2
_SUFFIX = ".safetensors"
_RECOUNT = 256  # writes after which the files of other processes are counted
_ABANDONED = 3600  # seconds after which a file that was never finished belongs to nobody


class DiskTier:
    """Files below one folder, up to `max_bytes`; several processes may use the folder at once.

    Args:
        folder: a folder that can be written.
        max_bytes: cap on the size of all files; each process may be beyond it by what it writes between two counts.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder / f"hf_kvopt-{VERSION}", max_bytes
        self._lock = threading.Lock()
        self._writes = 0
        self.num_bytes = sum(size for _, _, size in self._files())

    def path(self, model: str, text: str) -> Path:
        """Return where the block of a text lies that a model computed."""
        return self.folder / model / text[:2] / f"{text}{_SUFFIX}"

    def get(self, path: Path) -> Record | None:
        """Return the record of a file; None where there is none, or a damaged one, which is removed."""
        try:
            return _read(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            _say_once("read", error.strerror or str(error))
            return None
        except (ValueError, KeyError, TypeError, struct.error) as error:
            logger.warning("%s is damaged (%s): it is removed, and its text computed anew", path, error)
            path.unlink(missing_ok=True)
            return None

    def put(
        self,
        path: Path,
        record: Record,
        kept: Collection[Path] = (),
        is_wanted: Callable[[], bool] = lambda: True,
    ) -> bool:
        """Write a record; returns whether it is there now.

        Args:
            path: where; a file that is there already is left as it is, but for exact blocks that it lacks.
            record: what.
            kept: files that are of more use than this one, and do not go for it.
            is_wanted: asked before the file appears.
        """
        size = record.data.numel()
        if path.is_file():
            known = self.get(path) if record.is_exact else record
            if known is not None and known.is_exact >= record.is_exact:
                self.touch(path)
                return True
        if size > self.max_bytes:
            _say_once("written", f"a block takes {size} bytes, and all files may take {self.max_bytes}")
            return False
        temporary = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
        try:
            if not self._make_room(size, kept):
                return False
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write(temporary, record)
            written = temporary.stat().st_size
            with self._lock:
                if not is_wanted():
                    return False
                temporary.replace(path)
                self.num_bytes += written
        except OSError as error:
            _say_once("written", error.strerror or str(error))
            return False
        finally:
            _remove(temporary)
        return True

    def touch(self, path: Path) -> None:
        """Note a use of a file, if it is there."""
        try:
            now = time.time_ns()  # finer than what the file system would take
            os.utime(path, ns=(now, now))
        except OSError:
            return  # gone, or on a disk that nobody may write to: both do no harm

    def forget(self, models: Iterable[str]) -> None:
        """Remove all files of some models."""
        with self._lock:
            for model in models:
                shutil.rmtree(self.folder / model, ignore_errors=True)
            self.num_bytes = sum(size for _, _, size in self._files())

    def _make_room(self, size: int, kept: Collection[Path]) -> bool:
        """Remove files, the least recently used first, until `size` bytes more fit; returns whether they do."""
        with self._lock:
            self._writes += 1
            is_due = self._writes % _RECOUNT == 0 or self.num_bytes + size > self.max_bytes
        if not is_due:
            return True
        files = sorted(self._files())
        held = sum(size for _, _, size in files)
        # A tenth more than asked for, so that a full folder is not listed at every write.
        wanted = self.max_bytes - size if held + size <= self.max_bytes else self.max_bytes * 9 // 10 - size
        for _, path, length in files:
            if held <= max(0, wanted):
                break
            if path not in kept:
                _remove(path)
                held -= length
        with self._lock:
            self.num_bytes = held
        return held + size <= self.max_bytes

    def _files(self) -> Iterator[tuple[float, Path, int]]:
        """Yield last use, path and size of each file; remove what was never finished."""
        for path in self.folder.glob("*/*/*"):
            try:
                found = path.stat()
            except OSError:
                continue  # another process removed it
            if path.suffix == _SUFFIX:
                yield found.st_mtime, path, found.st_size
            elif path.suffix == ".tmp" and found.st_mtime < time.time() - _ABANDONED:
                _remove(path)


def _write(path: Path, record: Record) -> None:
    manifest = {
        "version": VERSION,
        "tokens": list(record.tokens),
        "exact": record.is_exact,
        "layout": record.layout,
        "tensors": {"block": _digest(memoryview(record.data.numpy().data))},
    }
    text = json.dumps(manifest, sort_keys=True)
    header = {"manifest": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file({"block": record.data.contiguous()}, path, metadata=header)


def _read(path: Path) -> Record:
    """Return the record of a file, every byte of which was checked; raises ValueError and others for a damaged one."""
    data = bytearray(path.read_bytes())
    (length,) = struct.unpack_from("<Q", data)
    header = json.loads(bytes(data[8 : 8 + length]))
    text = header["__metadata__"]["manifest"]
    if hashlib.sha256(text.encode()).hexdigest() != header["__metadata__"]["sha256"]:
        raise ValueError("its manifest was changed")
    manifest = json.loads(text)
    if manifest["version"] != VERSION:
        raise ValueError(f"it has version {manifest['version']}, not {VERSION}")
    if header["block"]["data_offsets"] != [0, len(data) - 8 - length]:
        raise ValueError("it was cut off")
    if _digest(memoryview(data)[8 + length :]) != manifest["tensors"]["block"]:
        raise ValueError("its bytes were changed")
    block = torch.frombuffer(data, dtype=torch.uint8, offset=8 + length)
    return Record(tuple(manifest["tokens"]), manifest["exact"], manifest["layout"], block)


def _digest(data: memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _say_once("removed", error.strerror or str(error))


@cache
def _say_once(what: str, reason: str) -> None:
    logger.warning("files of disk_tier cannot be %s: %s; such blocks are computed anew", what, reason)
