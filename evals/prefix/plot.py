"""Plot of the time to first token over the known share of the prompt."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one line for each prompt length and batch: the speedup on the left, tokens computed on the right."""
    mpl.use("Agg")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = sorted({(row["length"], row["batch"]) for row in rows})
    for length, batch in kinds:
        line = sorted((row for row in rows if (row["length"], row["batch"]) == (length, batch)), key=lambda r: r["hit"])
        hits = [100 * row["hit"] for row in line]
        label = f"{length} tokens, batch {batch}"
        left.plot(hits, [row["plain_ms"] / row["shared_ms"] for row in line], marker="o", label=label)
        right.plot(hits, [row["shared_tokens"] / row["plain_tokens"] for row in line], marker="o", label=label)
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(yscale="log", xlabel="known part of the prompt, %", ylabel="times faster first token")
    right.set(xlabel="known part of the prompt, %", ylabel="prefill positions, shared / plain")
    left.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
