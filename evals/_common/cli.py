"""Command line of an eval: one clear line and exit status 2 for whatever the caller typed wrong."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from hf_kvopt import KVOptError

_FOLDER = Path(__file__).resolve().parents[1]
# Beside the evals of a checkout; an installed wheel writes where the user is.
RESULTS = _FOLDER / "results" if (_FOLDER.parent / "pyproject.toml").exists() else Path("hf_kvopt-results")


class BadArgumentError(ValueError):
    """An argument that cannot be used; its text says what, got, expected."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, and which turns `BadArgumentError` into such a line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def run(self, body: Callable[[argparse.Namespace], int], argv: Sequence[str] | None = None) -> int:
        """Parse `argv`, run `body`, and give its exit status; leave with status 2 on a bad argument."""
        args = self.parse_args(argv)
        try:
            return body(args)
        except (BadArgumentError, KVOptError) as error:
            self.error(str(error))


def at_least(minimum: int) -> Callable[[str], int]:
    """Make an argument type: an integer not below `minimum`."""

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
