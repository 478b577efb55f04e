"""Shared parts of the commands: a parser with one-line errors and exit status 2, common arguments, tables, JSON."""

import argparse
import json
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from hf_kvopt.errors import KVOptError
from hf_kvopt.overrides.cache_maker import CACHES
from hf_kvopt.packaged import model_source
from hf_kvopt.plan import BadInput


class Parser(argparse.ArgumentParser):
    """An argument parser that reports `BadInput` and `KVOptError` in one line, with exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def run(self, body: Callable[[argparse.Namespace], int], argv: Sequence[str] | None) -> int:
        """Parse `argv`, put a packaged model's folder for its name, run `body` and return its exit status."""
        args = self.parse_args(argv)
        try:
            if "model" in args:
                args.model = model_source(args.model)
            return body(args)
        except (BadInput, KVOptError) as error:
            self.error(str(error))


def whole_number(text: str) -> int:
    """Parse a number of at least 1; an argument type."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1: got {text!r}; for example 8")
    return int(text)


def model_parser(command: str, description: str, examples: str, context: str) -> Parser:
    """Build the parser of a command about a model, with options for context, batch, device, budget and dtype."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(f"python -m hf_kvopt {command}", description=description, epilog=examples, formatter_class=form)
    parser.add_argument("model", metavar="MODEL", help="hub id, folder, config.json, or smollm2 (from a wheel)")
    parser.add_argument("--context", default=context, help="tokens a row, prompt and new ones (%(default)s)")
    parser.add_argument("--batch", type=whole_number, default=1, help="rows (%(default)s)")
    parser.add_argument("--device", help="such as H200, A100-40, RTX4090, cpu or auto; 0.9 of its memory is the budget")
    parser.add_argument("--budget", help="bytes for weights and cache, a device, such as 24GiB")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (the config's, or bfloat16)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


BATCHING = (
    "cache", "draft", "max_tokens", "max_rows", "prefill_chunk", "host_tier", "disk_tier", "disk_limit",
)  # fmt: skip
"""Settings of a batch that a command has options for; see `add_batching`."""


def add_batching(parser: argparse.ArgumentParser, rows: str) -> None:
    """Add the options of a command that batches; `rows` is what it calls those of the batch."""
    add = parser.add_argument
    add("--cache", choices=sorted(CACHES), default="paged", help="how keys and values are stored (%(default)s)")
    add("--draft", help="prompt_lookup, lookahead, or the folder or hub id of a draft head")
    add("--max-tokens", help=f"hard cap on the tokens held over all {rows}, such as 200k (grows as needed)")
    add("--max-rows", type=whole_number, default=64, help=f"{rows} computed at a time (%(default)s)")
    add("--prefill-chunk", type=whole_number, default=512, help="prompt tokens of one step (%(default)s)")
    add("--host-tier", help="memory of the host for prompts and rows that the device has no room for, such as 16GiB")
    add("--disk-tier", help="folder for prompts that neither has room for")
    add("--disk-limit", help="most bytes of that folder, such as 100GiB (half of what is free there)")


def table(rows: Sequence[Sequence[object]], columns: Sequence[str] = ()) -> str:
    """Align rows: with columns, the first as text and the others to the right; without, all as text."""
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
    """Format `name  value` lines with aligned values."""
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name.ljust(width)}  {value}" for name, value in rows)


def as_json(value: Any) -> str:
    """Format a report as JSON."""
    return json.dumps(value, indent=2, default=str)
