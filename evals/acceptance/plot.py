"""Plot of the speed-up by batch size, and of acceptance by depth."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw bars of the speed-up over plain decoding on the left, acceptance by depth at batch 1 on the right."""
    mpl.use("Agg")
    figure = Figure(figsize=(11, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    colours: dict[str, Any] = {}
    greedy = [row for row in rows if row["temperature"] == 0]
    batches = sorted({row["batch"] for row in greedy})
    names = list(dict.fromkeys(row["side"] for row in greedy))
    width = 0.8 / max(1, len(names))
    for place, name in enumerate(names):
        found = {row["batch"]: row for row in greedy if row["side"] == name}
        at = [i + place * width for i, batch in enumerate(batches) if batch in found]
        bars = left.bar(at, [found[batch]["speedup_dynamic"] for batch in batches if batch in found], width, label=name)
        colours[name] = bars.patches[0].get_facecolor() if bars.patches else None
        first = found.get(batches[0])
        if first is not None and first.get("acceptance_by_depth"):
            shares = first["acceptance_by_depth"]
            right.plot(range(1, len(shares) + 1), shares, marker="o", color=colours[name])
    left.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="batch size", ylabel="tokens a second, DynamicCache is 1")
    left.set_xticks([i + 0.4 - width / 2 for i in range(len(batches))], [str(batch) for batch in batches])
    right.set(xlabel="depth", ylabel=f"accepted, of drafts so deep, batch {batches[0]}", ylim=(0, 1))
    # Outside, as bars and lines fill the axes.
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper center", ncols=5, fontsize="x-small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
