"""Prints what is supported, as Markdown: `python -m tests.models.table` by model, `--grouped` for docs/models.md."""

import argparse
import logging
import sys
from collections import defaultdict
from typing import NamedTuple

import torch
import transformers

from tests.models import expected, routes
from tests.models.cases import UNTESTABLE, Case, covered_cases
from tests.models.kinds import layer_kinds


class Row(NamedTuple):
    """One model of the table."""

    model: str
    layers: str
    reads: str  # how attention gets at keys and values
    result: str


def row(case: Case) -> Row:
    """Run a model through `enable`."""
    try:
        got = routes.by_enable(case)
    except Exception as error:  # a row of the table, not its end
        got = routes.Outcome("fails", f"{type(error).__name__}: {error}")
    reads, result = "", f"{got.result}: {got.detail}"
    if got.result == "exact":
        reads = "gathered" if got.num_fallbacks else "in place"
        own = expected.OWN_ATTENTION.get(case.name)
        result = "exact" if own is None else f"exact, its own attention: {own}"
    elif got.result == "unused":
        result = f"exact, not paged: {expected.NOT_PAGED.get(case.name, 'unknown')}"
    elif got.result == "refused":
        result = f"refused: {expected.REFUSED.get(case.name, got.detail)}"
    return Row(case.name, " + ".join(layer_kinds(case)), reads, result)


def by_model(rows: list[Row]) -> str:
    lines = [f"| {r.model} | {r.layers} | {r.reads} | {r.result} |" for r in rows]
    return "\n".join(["| model | layers of the cache | attention reads | result |", "|---|---|---|---|", *lines])


def grouped(rows: list[Row]) -> str:
    """A section for each result and way of reading, with one line for all models whose layers are alike."""
    sections: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        sections[r.result, r.reads][r.layers if r.result.startswith("exact") else ""].append(r.model)
    return "\n\n".join(_section(*title, sections[title]) for title in sorted(sections, key=_rank))


def _rank(title: tuple[str, str]) -> tuple[int, str, bool]:
    """What works best first."""
    result, reads = title
    kinds = ("exact", "exact, its own attention", "exact, not paged", "refused")
    kind = result.partition(":")[0]
    return kinds.index(kind) if kind in kinds else len(kinds), result, reads != "in place"


def _section(result: str, reads: str, by_layers: dict[str, list[str]]) -> str:
    title = f"{result}, read in place" if reads == "in place" else f"{result}, {reads}" if reads else result
    total = sum(map(len, by_layers.values()))
    head = f"### {title[0].upper()}{title[1:]} ({total})\n"
    if list(by_layers) == [""]:
        return f"{head}\n{', '.join(by_layers[''])}"
    ordered = sorted(by_layers.items(), key=lambda item: -len(item[1]))
    lines = [f"| {layers} | {len(names)} | {', '.join(names)} |" for layers, names in ordered]
    return "\n".join([head, "| layers of the cache | types | models |", "|---|---:|---|", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--grouped", action="store_true", help="one line for all models that are alike")
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    logging.getLogger("hf_kvopt").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    rows = []
    for case in covered_cases():
        print(f"\r{case.name:40}", end="", file=sys.stderr)
        rows.append(row(case))
    print(f"\r{' ':40}\r", end="", file=sys.stderr)
    print((grouped if args.grouped else by_model)(rows))
    print("\n### Not run\n\ntransformers itself does not generate with these here:\n")
    print("\n".join(f"- {name}: {reason}" for name, reason in UNTESTABLE.items()))


if __name__ == "__main__":
    main()
