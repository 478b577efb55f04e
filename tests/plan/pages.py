"""Reader of a printed page, sentence by sentence: each must match a rule, and each rule compares figures with figures.

A rule is a pattern for a whole line and a check of what it found. Patterns name their pieces: `{gib}` is a size in
bytes, `{num}` a number, `{ratio}` a factor.
"""

import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import pytest

from hf_kvopt.plan import Device, devices, show_bytes
from hf_kvopt.plan.weights import count_weights

# Fixed measurements of a CPU, so that a page is reproducible.
HERE = Device("cpu (x86_64)", 96 * 1024**3, 4e10, 8e11, None, "measured here: made up")

Check = Callable[..., Any]
_PIECES = {
    "gib": r"([\d.,]+ (?:B|KiB|MiB|GiB|TiB))",
    "num": r"(-?[\d,]+(?:\.\d+)?)",
    "percent": r"(\d+(?:\.\d+)?)%",
    "word": r"([\w.]+)",
    "any": r"(.*)",
    "time": r"([\d,]+(?:\.\d+)? (?:ms|s))",
    "largest": r"(largest [a-z]+ at .+?)",
    "count": r"(none|[\d,]+ (?:rows?|tokens?))",
    "capped": r"(?:, (none|[\d,]+ (?:rows?|tokens?)) with max_tokens set to just these)?",
    "beyond": r"(?:; the model is made for ([\d,]+))?",
    "versus": r"([\d,.]+ -> [\d,.]+ (?:ms|s) \([\d,.]+x\))",
}


class Rule(NamedTuple):
    """Pattern of a sentence, and the check of its figures."""

    pattern: str
    check: Check

    def matches(self, line: str) -> re.Match[str] | None:
        parts = re.split(r"(\{\w+\})", self.pattern)
        regex = "".join(
            _PIECES[part[1:-1]] if part[1:-1] in _PIECES and part[0] == "{" else re.escape(part) for part in parts
        )
        return re.fullmatch(regex, line)


def hold(line: str, rules: Iterable[Rule]) -> None:
    """Check a line against the rules; one of them must match it."""
    for rule in rules:
        found = rule.matches(line)
        if found is not None:
            said = rule.check(*found.groups())
            assert said is None or bool(said), f"{line!r} is not so ({rule.pattern})"
            return
    raise AssertionError(f"no rule knows {line!r}")


def number(text: str) -> float:
    return float(text.replace(",", ""))


def size_of(text: str) -> float:
    """Return the bytes of a printed size."""
    figure, unit = text.split()
    return number(figure) * 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)


def seconds(text: str) -> float:
    value, unit = text.split()
    return number(value) * {"ms": 1e-3, "s": 1.0}[unit]


def near(text: str, value: float) -> bool:
    """Return whether a printed number is `value`, rounded to the digits that are shown."""
    digits = len(text.partition(".")[2])
    return abs(number(text) - value) <= 0.5001 * 10**-digits + 1e-9 * abs(value)


def same_bytes(text: str, size: float) -> bool:
    return text == show_bytes(size)


def same_seconds(text: str, value: float) -> bool:
    number_text, unit = text.split()
    return near(number_text, value * {"ms": 1e3, "s": 1.0}[unit])


def same_versus(text: str, before: float, after: float) -> bool:
    """Return whether `a -> b unit (rx)` states these times, and the ratio that follows from them."""
    found = re.fullmatch(r"([\d,.]+) -> ([\d,.]+) (ms|s) \(([\d,.]+)x\)", text)
    assert found is not None
    scale = {"ms": 1e3, "s": 1.0}[found[3]]
    figures = near(found[1], before * scale) and near(found[2], after * scale) and near(found[4], before / after)
    # The ratio must also follow from the printed figures.
    shown = number(found[1]) / number(found[2])
    return figures and abs(number(found[4]) - shown) <= 0.03 * shown


def table_of(lines: Sequence[str]) -> dict[str, list[str]]:
    """Return the rows of a printed table by their first column."""
    rule = next(i for i, line in enumerate(lines) if set(line) <= {"-", " "} and line)
    rows = (re.split(r"\s{2,}", line.strip()) for line in lines[rule + 1 :])
    return {name: cells for name, *cells in rows}


def require_plain_figures(page: str) -> None:
    """Check that a page shows no exponent, no NaN or infinity, and no plural of one."""
    for wrong in (
        r"\de[+-]\d",
        r"\bnan\b",
        r"\binf\b",
        r"\b1 (rows|tokens|batches|devices)\b",
        r"\b0\.0% (longer|of a request)",
    ):
        assert not re.search(wrong, page), f"{wrong}: {re.search(wrong, page)}"


def pretend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `cpu` return HERE, and count the weights of each model once: building the larger ones takes longest."""
    counted: dict[Any, Any] = {}

    def count_once(config: Any, dtype: Any, device: Device | None = None) -> Any:
        key = config.model_type, config.get_text_config(decoder=True).num_hidden_layers, dtype, device
        if key not in counted:
            counted[key] = count_weights(config, dtype, device)
        return counted[key]

    monkeypatch.setattr(devices, "_cpu_here", lambda: HERE)
    for room in ("setup", "memory"):
        monkeypatch.setattr(sys.modules[f"hf_kvopt.plan.{room}"], "count_weights", count_once)
