"""Part files: finished rows of a run, kept line by line until all are there, then joined in order.

    out.jsonl.parts/run.json                 what the run is about: another one is refused
    out.jsonl.parts/<process>.jsonl          finished rows of one process, appended as they end
    out.jsonl                                all rows in order, once each: written by whoever ends last

Processes share nothing but this folder, so they may run on several machines over one file system. A process that is
killed loses no finished row: a line that was cut off is not counted, and its row is computed again.
"""

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from hf_kvopt.errors import KVOptError
from hf_kvopt.files import write_whole

INDEX = "index"
"""Column that numbers the rows of the input."""


class Parts:
    """The finished rows of one run.

    Args:
        output: the file that is to be made; the folder `<output>.parts` lies beside it until it is there.
        about: what the rows depend on: input, model, settings. JSON values.

    Raises:
        KVOptError: the folder cannot be written, or it belongs to a run about something else.
    """

    def __init__(self, output: Path, about: dict[str, Any]) -> None:
        self.output = output
        self.folder = output.with_name(output.name + ".parts")
        self._own = self.folder / f"{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._file: Any = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._require_same(about)
            self._file = self._own.open("a", encoding="utf8")
        except OSError as error:
            raise KVOptError(
                f"cannot write beside the output {str(output)!r}: got {error}; name another place"
            ) from error

    def done(self) -> set[int]:
        """Return the numbers of the rows that are finished."""
        return {number for number, _ in self._lines()}

    def add(self, line: dict[str, Any]) -> None:
        """Keep a finished row; it is there after a kill as soon as this returns.

        Args:
            line: JSON values, its number under `INDEX`.
        """
        self._file.write(json.dumps(line, ensure_ascii=False, default=str) + "\n")
        self._file.flush()

    def join(self, num_rows: int) -> int:
        """Write the output once all rows are there, and remove the folder; return how many are missing.

        Any number of processes may call this at any time; one of them writes.
        """
        self._file.close()
        with suppress(FileNotFoundError), self._locked():  # the folder is gone where another process joined the rows
            if not self.output.exists():
                places: dict[int, tuple[Path, int]] = dict(self._lines())
                if len(places) < num_rows:
                    return num_rows - len(places)
                self._write(places, num_rows)
        shutil.rmtree(self.folder, ignore_errors=True)
        return 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if self._own.exists() and not self._own.stat().st_size:
            self._own.unlink()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep other processes out; a process that is killed lets go."""
        with (self.folder / "lock").open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _require_same(self, about: dict[str, Any]) -> None:
        path = self.folder / "run.json"
        if not path.exists():
            write_whole(path, json.dumps(about, indent=1, sort_keys=True))
        found = json.loads(path.read_text())
        said = json.loads(json.dumps(about))
        unlike = sorted(name for name in {*found, *said} if found.get(name) != said.get(name))
        if unlike:
            shown = "; ".join(f"{name} was {found.get(name)!r:.60}, is {said.get(name)!r:.60}" for name in unlike)
            raise KVOptError(
                f"a run goes on with what it began with: got another one in {str(self.folder)!r} ({shown}); use the "
                "same input and settings, name another output, or remove that folder"
            )

    def _lines(self) -> Iterator[tuple[int, tuple[Path, int]]]:
        """Yield the number of each finished row and where its line lies."""
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as lines:
                place = 0
                for line in lines:
                    number = _number_of(line)
                    if number is not None:
                        yield number, (path, place)
                    place += len(line)

    def _write(self, places: dict[int, tuple[Path, int]], num_rows: int) -> None:
        scratch = self.output.with_name(f"{self.output.name}.{uuid.uuid4().hex[:8]}.tmp")
        files = {path: path.open("rb") for path, _ in places.values()}
        try:
            with scratch.open("wb") as out:
                for number in range(num_rows):
                    path, place = places[number]
                    files[path].seek(place)
                    out.write(files[path].readline())
                out.flush()
                os.fsync(out.fileno())
            scratch.replace(self.output)
        finally:
            scratch.unlink(missing_ok=True)
            for file in files.values():
                file.close()


def _number_of(line: bytes) -> int | None:
    """Return the number of a row's line; None for a line that was cut off."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    number = row.get(INDEX) if isinstance(row, dict) else None
    return number if isinstance(number, int) else None
