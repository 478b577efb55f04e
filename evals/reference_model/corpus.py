"""Corpus of the reference model: training sources and held-out modules.

The corpus is the Python standard library (PSF licence) of one or more interpreters. The modules named in
`HELDOUT` are never trained on: neither they nor their tests, in any version, nor any file that shares a run
of `SHINGLE_LINES` non-blank lines with them. Near-duplicates between versions are dropped the same way.
"""

import hashlib
import json
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

HELDOUT = (
    "calendar",
    "contextlib",
    "csv",
    "fileinput",
    "fractions",
    "gettext",
    "graphlib",
    "http/cookies",
    "shlex",
    "socketserver",
    "tempfile",
    "textwrap",
    "wave",
)
SHINGLE_LINES = 6
# A file of another version is kept if at least this share of its shingles is new.
MIN_NEW_SHARE = 0.4
MAX_FILE_BYTES = 300_000
# Tables, data, intentional syntax errors, text in other encodings, generated code.
SKIPPED = re.compile(
    r"(^|/)(site-packages|__pycache__|encodings|pydoc_data|lib2to3/tests/data|config-[^/]*|multibytecodec"
    r"|encoded_modules|_sysconfigdata[^/]*|bad_?[^/]*|badsyntax[^/]*|test_multibytecodec[^/]*"
    r"|test_codecencodings[^/]*|test_codecmaps[^/]*|html/entities\.py|sre_constants\.py)(/|$)"
)


class SourceFile(NamedTuple):
    """One file of the corpus: `name` is relative to the library's root, with `/`."""

    name: str
    text: str
    is_test: bool


def is_heldout(name: str) -> bool:
    """Return whether a path in the library is a held-out module, part of its tests, or of its package."""
    stem = name.removesuffix(".py")
    for module in HELDOUT:
        last = module.rpartition("/")[2]
        if stem == module or stem.startswith(f"{module}/") or re.search(rf"(^|/)test_(http_)?{last}", stem):
            return True
    return False


def shingles(text: str) -> set[int]:
    """Hash every run of `SHINGLE_LINES` non-blank lines, without their indentation."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    runs = ("\n".join(lines[i : i + SHINGLE_LINES]) for i in range(max(1, len(lines) - SHINGLE_LINES + 1)))
    return {int.from_bytes(hashlib.blake2b(run.encode(), digest_size=8).digest(), "big") for run in runs}


def _looks_like_data(text: str) -> bool:
    """Return whether a text is tables or blobs instead of code, by its digits, escapes and line lengths."""
    if not text.strip():
        return True
    odd = sum(map(str.isdigit, text)) + 3 * text.count("\\x") + 3 * text.count("\\u")
    return odd > 0.15 * len(text) or max(map(len, text.splitlines())) > 2_000


def _files(root: Path) -> Iterator[SourceFile]:
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if SKIPPED.search(name) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if not _looks_like_data(text):
            is_test = bool(re.search(r"(^|/)(tests?|idle_test)/", name))
            yield SourceFile(name, text, is_test)


def default_source() -> Path:
    """Return the standard library of the running interpreter."""
    return Path(sysconfig.get_path("stdlib"))


def training_files(sources: Sequence[Path]) -> list[SourceFile]:
    """Collect the training files; the first source is read whole, later ones where they differ.

    Raises:
        ValueError: a source holds no Python files.
    """
    banned = set().union(*(shingles(text) for _, text in heldout_records(sources[0])))
    seen: set[int] = set()
    kept: list[SourceFile] = []
    for root in sources:
        before = len(kept)
        for file in _files(root):
            if is_heldout(file.name):
                continue
            own = shingles(file.text)
            if own & banned or len(own - seen) < MIN_NEW_SHARE * len(own):
                continue
            seen |= own
            kept.append(file)
        if len(kept) == before:
            raise ValueError(f"{root} adds no Python sources: give the root of a standard library")
    return kept


def heldout_records(source: Path) -> list[tuple[str, str]]:
    """Read the held-out modules as (name, text) from a standard library."""
    return [(f"{name}.py", (source / f"{name}.py").read_text(encoding="utf-8")) for name in HELDOUT]


def write_heldout(path: Path, source: Path) -> None:
    """Write the held-out modules as JSON lines: name, text, licence, Python version."""
    version = ".".join(map(str, sys.version_info[:3]))
    with path.open("w", encoding="utf-8") as out:
        for name, text in heldout_records(source):
            record = {"name": name, "python": version, "license": "PSF-2.0", "text": text}
            out.write(json.dumps(record, ensure_ascii=False) + "\n")


def corpus_hash(files: Sequence[SourceFile]) -> str:
    """Return a SHA-256 over names and contents, in order."""
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.text.encode() + b"\0")
    return digest.hexdigest()
