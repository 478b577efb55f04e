"""Machine code that earlier processes compiled: one file for each kernel.

    <home>/kernels/<hash of all that the code depends on>.o      home: $HF_KVOPT_HOME, or ~/.cache/hf_kvopt

A file begins with the SHA-256 of the code behind it. One that is torn is ignored and said so; a folder that cannot be
read or written costs the time of compiling and nothing else. Files are native code that is run: a folder which others
may write to is no place for them.
"""

import hashlib
import logging
from functools import cache
from pathlib import Path

from hf_kvopt.files import home_folder, write_whole

logger = logging.getLogger(__name__)

_MOST_FILES = 512  # some 30 KiB each
_PACKAGE = Path(__file__).parents[2]


def path_of(facts: str) -> Path | None:
    """Return the file of a kernel, named by what was asked for and the compiler (`facts`), and by the sources.

    None where there is no home, or the sources cannot be read.
    """
    try:
        name = hashlib.sha256(f"{facts} {_sources()}".encode()).hexdigest()[:40]
        return home_folder() / "kernels" / f"{name}.o"
    except (OSError, RuntimeError) as error:
        logger.info("machine code is not kept: %s", error)
        return None


def read(path: Path | None) -> bytes | None:
    """Return the code in a file, None where there is none or it is not whole."""
    if path is None:
        return None
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    if hashlib.sha256(code).digest() != digest:
        logger.warning("%s is ignored: got content that differs from its SHA-256; it will be written anew", path)
        return None
    return code


def write(path: Path | None, code: bytes) -> None:
    """Keep code for later processes, and of all files the newest `_MOST_FILES`."""
    if path is None:
        return
    try:
        write_whole(path, hashlib.sha256(code).digest() + code)
        files = sorted(path.parent.glob("*.o"), key=lambda file: file.stat().st_mtime)
        for file in files[:-_MOST_FILES]:
            file.unlink(missing_ok=True)
    except OSError as error:
        logger.info("machine code is not kept: %s", error)


@cache
def _sources() -> str:
    # What a kernel is written by: edits of it must not meet what was compiled before.
    folders = ("kernels", "kernels/cpu/jit", "quant")
    files = sorted(file for folder in folders for file in (_PACKAGE / folder).glob("*.py"))
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()
