"""Command line of an eval: one line and exit status 2 for any invalid argument."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hf_kvopt import KVOptError

_FOLDER = Path(__file__).resolve().parents[1]
# Beside the evals of a checkout; an installed wheel writes to the working directory.
RESULTS = _FOLDER / "results" if (_FOLDER.parent / "pyproject.toml").exists() else Path("hf_kvopt-results")


class BadArgumentError(ValueError):
    """An argument that cannot be used; its text states what, got, expected."""


class Parser(argparse.ArgumentParser):
    """An argument parser that reports errors and `BadArgumentError` in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def run(self, body: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None) -> int:
        """Parse `argv`, run `body`, and return its exit status; exit with status 2 on an invalid argument."""
        args = self.parse_args(argv)
        try:
            return body(args)
        except (BadArgumentError, KVOptError) as error:
            self.error(str(error))


def at_least(minimum: int) -> Callable[[str], int]:
    """Make an argument type: an integer of at least `minimum`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected an integer, got {text!r}") from None
        if value < minimum:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {minimum}, got {value}")
        return value

    return parse


def add_output_argument(parser: argparse.ArgumentParser, file_name: str) -> None:
    """Add `--out`, the JSON file that rows are appended to."""
    parser.add_argument(
        "--out", type=Path, default=RESULTS / file_name, help="JSON file to append rows to (%(default)s)"
    )
