"""The folder of what is made once for a user, and files that appear whole or not at all, whatever ends meanwhile."""

import os
import uuid
from pathlib import Path


def home_folder() -> Path:
    """Return the folder that holds what is made once for a user: `$HF_KVOPT_HOME`, or `~/.cache/hf_kvopt`."""
    return Path(os.environ.get("HF_KVOPT_HOME") or Path.home() / ".cache" / "hf_kvopt").expanduser()


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write `content` as `path`, text in UTF-8, in place of what is there, and return it; make its folder.

    Raises:
        OSError: it cannot be written; what was there stays, and nothing is left beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        scratch.write_bytes(content.encode() if isinstance(content, str) else content)
        return scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
