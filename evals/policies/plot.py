"""Plot of what each policy loses over the memory that it held."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

PANELS = (
    ("perplexity_ratio", "perplexity of the last quarter, times whole"),
    ("needle", "needle: answer tokens right"),
    ("multi_key", "one of several keys: answer tokens right"),
)


def draw(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw one panel a task, and in each one line a policy."""
    mpl.use("Agg")
    figure = Figure(figsize=(13, 4), layout="constrained")
    figure.suptitle(title, fontsize=10)
    for axis, (name, label) in zip(figure.subplots(1, len(PANELS)), PANELS, strict=True):
        for policy in dict.fromkeys(row["policy"] for row in rows):
            line = sorted((row for row in rows if row["policy"] == policy), key=lambda row: row["held"])
            held, values = [100 * row["held"] for row in line], [row[name] for row in line]
            axis.plot(held, values, marker="o", label=policy)
        axis.set(xlabel="memory held, % of the whole cache", ylabel=label)
    axis.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
