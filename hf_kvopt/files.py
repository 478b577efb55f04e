"""Files that appear whole or not at all, whatever ends meanwhile."""

import os
import uuid
from pathlib import Path


def write_whole(path: Path, text: str) -> Path:
    """Write `text` in UTF-8 as `path`, in place of what is there, and return it; its folder is made where it lacks.

    Raises:
        OSError: it cannot be written; what was there stays, and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        scratch.write_text(text, encoding="utf-8")
        return scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
