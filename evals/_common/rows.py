"""JSON rows: every figure with the setup that it was measured on."""

import json
import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from evals._common.cli import BadArgumentError

Row = Mapping[str, Any]


def provenance(device: torch.device) -> dict[str, Any]:
    """Return where and when a row was measured: revision, device, versions, date."""
    return {
        "revision": _revision(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": describe_device(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "transformers", "triton", "hf-kvopt")},
    }


def describe_device(device: torch.device) -> str:
    """Name a GPU by its product name, a CPU by architecture, cores and vector unit."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    vector = torch.backends.cpu.get_cpu_capability()
    return f"{device.type}: {platform.machine()}, {os.cpu_count()} cores, {vector}"


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows to a JSON list, one row a line; the file stays complete if the process dies.

    Raises:
        BadArgumentError: the file holds something other than a JSON list.
    """
    everything = [*read_rows(path), *rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    lines = ",\n".join(json.dumps(_finite(row), allow_nan=False) for row in everything)
    scratch.write_text(f"[\n{lines}\n]\n", encoding="utf8")
    scratch.replace(path)


def read_rows(path: Path) -> list[Row]:
    """Return the rows of `append_rows`; a missing file holds none."""
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text(encoding="utf8"))
    except (OSError, ValueError) as error:
        raise BadArgumentError(f"cannot append rows to {str(path)!r}: {error}") from error
    if not isinstance(rows, list):
        raise BadArgumentError(f"cannot append rows to {str(path)!r}: expected a JSON list")
    return rows


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by null, as JSON cannot express them."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _revision() -> str:
    """Return the commit of this checkout, with `+` if the working tree differs from it."""
    here = Path(__file__).parent
    try:
        commit = _git(here, "rev-parse", "--short=12", "HEAD")
        return commit + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
