"""Throughput of each way to batch, and time to the first token over the rate of arrivals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw tokens a second at once, over those of static batches, on the left; percentiles under load on the right."""
    mpl.use("Agg")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    models = list(dict.fromkeys(row["model"] for row in rows))
    sides = list(dict.fromkeys(row["side"] for row in rows if row["rate_per_s"] is None))
    for number, model in enumerate(models):
        own = (row for row in rows if row["model"] == model and row["rate_per_s"] is None)
        speeds = {row["side"]: row["tokens_per_s"] for row in own}
        unit = speeds.get("static batches", next(iter(speeds.values()), 1.0))
        places = [sides.index(side) + 0.8 * number / len(models) for side in speeds]
        bars = left.bar(places, [speed / unit for speed in speeds.values()], width=0.8 / len(models), label=model)
        left.bar_label(bars, [f"{speed:.0f}/s" for speed in speeds.values()], fontsize="small")
        loaded = sorted((row for row in rows if row["model"] == model and row["rate_per_s"]), key=_rate)
        for share in ("p50", "p99") if loaded else ():
            values = [row[f"first_token_{share}_s"] for row in loaded]
            right.plot([_rate(row) for row in loaded], values, marker="o", label=f"{model}, {share}")
    left.set_xticks(
        [place + 0.4 - 0.4 / max(1, len(models)) for place in range(len(sides))],
        [side.replace(", ", ",\n") for side in sides],
        fontsize="small",
    )
    left.set(ylabel="tokens a second, over static batches", title="all requests at once")
    right.set(xlabel="requests a second", ylabel="time to first token, s", yscale="log", title="Poisson arrivals")
    right.yaxis.set_major_formatter("{x:g}")
    right.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.yaxis.set_minor_formatter(NullFormatter())
    for axes in (left, right):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _rate(row: Mapping[str, Any]) -> float:
    return float(row["rate_per_s"])
