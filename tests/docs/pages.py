"""Reads the pages: their Markdown, their fenced blocks, and the code in them as this transformers takes it."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from hf_kvopt import CACHE_KEYWORD

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "evals/reference_model/model"
# Written for a reader, who has a hub; run with what the repository has.
HUB_MODEL = "HuggingFaceTB/SmolLM2-135M"
PAGES = {path.relative_to(ROOT).as_posix(): path for path in sorted((ROOT / "docs").rglob("*.md"))}
_FENCE = re.compile(r"(?:^<!-- not run: (?P<reason>[^\n]*) -->\n)?^```(?P<kind>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """One fenced block of a page."""

    kind: str  # python, sh, text, ...
    text: str
    line: int  # of the page, at which the text begins
    reason: str | None  # why it is not run


def blocks(text: str) -> Iterator[Block]:
    """Yield the fenced blocks of a page in their order."""
    for found in _FENCE.finditer(text):
        line = text.count("\n", 0, found.start("text")) + 1
        yield Block(found["kind"], found["text"], line, found["reason"])


def as_run(code: str) -> str:
    """Return the code of a page for this machine and this transformers: a local model, its name of the cache."""
    code = code.replace(f'"{HUB_MODEL}"', repr(str(MODEL)))
    # `cache=cache` is an argument of generate(), `cache="int8"` one of enable().
    return re.sub(r"\bcache=(?=[a-zA-Z_])(?!None)", f"{CACHE_KEYWORD}=", code)
