"""What the commands share: a parser whose errors are one line and status 2, tables, JSON."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hf_kvopt.errors import KVOptError
from hf_kvopt.plan import BadInput


class Parser(argparse.ArgumentParser):
    """An argument parser that turns `BadInput` and `KVOptError` into one line and exit status 2, never a traceback."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def run(self, body: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
        """Parse `argv`, run `body` and return its exit status."""
        args = self.parse_args(argv)
        try:
            return body(args)
        except (BadInput, KVOptError) as error:
            self.error(str(error))


def table(rows: Sequence[Sequence[object]], columns: Sequence[str] = ()) -> str:
    """Align rows: under columns the first is text and the others line up on the right, without any all are text."""
    lines = [[str(cell) for cell in row] for row in ([columns] if columns else []) + list(rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    align = str.rjust if columns else str.ljust
    text = []
    for first, *others in lines:
        cells = [first.ljust(widths[0]), *(align(c, w) for c, w in zip(others, widths[1:], strict=True))]
        text.append("  ".join(cells).rstrip())
    if columns:
        text.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(text)


def pairs(rows: Sequence[tuple[str, object]]) -> str:
    """Write `name  value` lines with the values under each other."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def as_json(value: Any) -> str:
    """Write a report for other programs to read."""
    return json.dumps(value, indent=2, default=str)
