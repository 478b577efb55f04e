"""Plot of the use of the pool's slots, and of the sequences that ran at once."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw one bar for each strategy."""
    mpl.use("Agg")
    names = [row["strategy"] for row in rows]
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    bottoms = [0.0] * len(rows)
    for part, label in (("used", "holds a token"), ("internal", "handed out, empty"), ("external", "free, scattered")):
        sizes = [100 * row[part] / row["pool_tokens"] for row in rows]
        left.barh(names, sizes, left=bottoms, label=label)
        bottoms = [bottom + size for bottom, size in zip(bottoms, sizes, strict=True)]
    left.set(xlabel="mean over time, % of the pool")
    left.invert_yaxis()
    left.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    right.barh(names, [row["concurrency"] for row in rows], color="grey")
    right.set(xlabel="sequences at once, mean")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
