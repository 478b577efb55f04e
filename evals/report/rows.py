"""Reader of the rows that evals have written, in all of their forms."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Fields = dict[str, Any]


class Found(NamedTuple):
    """One row, the file it was found in, and whether a quick run of the report made it."""

    fields: Fields
    file: str
    is_quick: bool

    @property
    def eval(self) -> str:
        """Name of the eval that wrote it."""
        return str(self.fields.get("eval", self.file.split("-")[0].removesuffix(".json")))

    @property
    def date(self) -> str:
        """Date as ISO text; empty if the row has none."""
        return str(self.fields.get("date") or "")

    @property
    def where(self) -> str:
        """Device or card that it was measured on; empty if the row has none."""
        return str(self.fields.get("device") or self.fields.get("card") or "")


def read_results(folder: Path, is_quick: bool = False) -> tuple[list[Found], list[str]]:
    """Return the rows of every JSON file in `folder`, and a line for each unreadable file."""
    rows: list[Found] = []
    faults = []
    for path in sorted(folder.glob("*.json")):
        try:
            rows += [Found(fields, path.name, is_quick) for fields in _rows(json.loads(path.read_text("utf8")))]
        except (OSError, ValueError) as error:
            faults.append(f"{path.name}: {error}")
    return rows, faults


def _rows(content: Any) -> Iterable[Fields]:
    """Return the rows of a list, or of a record whose `rows` share its other fields."""
    if isinstance(content, list):
        return [row for row in content if isinstance(row, dict)]
    if isinstance(content, dict) and isinstance(content.get("rows"), list):
        shared = {name: value for name, value in content.items() if name != "rows"}
        return [{**shared, **row} for row in content["rows"] if isinstance(row, dict)]
    raise ValueError("expected a list of rows, or a record with rows")


def newest(rows: Iterable[Found], *names: str) -> list[Found]:
    """Return the last row of each configuration, identified by the fields `names`; full runs win over quick ones."""
    latest: dict[tuple[str, ...], Found] = {}
    for row in sorted(rows, key=lambda row: (not row.is_quick, row.date)):
        latest[tuple(str(row.fields.get(name)) for name in names)] = row
    return list(latest.values())
