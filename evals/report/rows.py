"""Finds the rows that evals have written, in every shape that they write them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

Fields = dict[str, Any]


class Found(NamedTuple):
    """One row, where it was found, and whether a short run of the report itself made it."""

    fields: Fields
    file: str
    is_quick: bool

    @property
    def eval(self) -> str:
        """Name of the eval that wrote it."""
        return str(self.fields.get("eval", self.file.split("-")[0].removesuffix(".json")))

    @property
    def date(self) -> str:
        """When, as ISO text; empty if the row does not say."""
        return str(self.fields.get("date") or "")

    @property
    def where(self) -> str:
        """On what."""
        return str(self.fields.get("device") or self.fields.get("card") or "")


def read_results(folder: Path, is_quick: bool = False) -> tuple[list[Found], list[str]]:
    """Return the rows of every JSON file in `folder`, and a line for each file that holds none."""
    rows: list[Found] = []
    faults = []
    for path in sorted(folder.glob("*.json")):
        try:
            rows += [Found(fields, path.name, is_quick) for fields in _rows(json.loads(path.read_text("utf8")))]
        except (OSError, ValueError) as error:
            faults.append(f"{path.name}: {error}")
    return rows, faults


def _rows(content: Any) -> Iterable[Fields]:
    """A list of rows, or a record whose `rows` share its other fields."""
    if isinstance(content, list):
        return [row for row in content if isinstance(row, dict)]
    if isinstance(content, dict) and isinstance(content.get("rows"), list):
        shared = {name: value for name, value in content.items() if name != "rows"}
        return [{**shared, **row} for row in content["rows"] if isinstance(row, dict)]
    raise ValueError("expected a list of rows, or a record with rows")


def newest(rows: Iterable[Found], *names: str) -> list[Found]:
    """The last row of each configuration, told apart by the fields `names`; full runs go before quick ones."""
    latest: dict[tuple[str, ...], Found] = {}
    for row in sorted(rows, key=lambda row: (not row.is_quick, row.date)):
        latest[tuple(str(row.fields.get(name)) for name in names)] = row
    return list(latest.values())
