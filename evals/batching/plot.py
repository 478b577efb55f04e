"""Throughput of each way to batch, and time to the first token over the rate of arrivals."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw tokens a second at once on the left, percentiles under load on the right."""
    mpl.use("Agg")
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    models = list(dict.fromkeys(row["model"] for row in rows))
    for number, model in enumerate(models):
        at_once = [row for row in rows if row["model"] == model and row["rate_per_s"] is None]
        sides = [row["side"] for row in at_once]
        places = [place + 0.8 * number / len(models) for place in range(len(at_once))]
        left.bar(places, [row["tokens_per_s"] for row in at_once], width=0.8 / len(models), label=model)
        left.set_xticks(range(len(sides)), sides, rotation=15)
        loaded = sorted((row for row in rows if row["model"] == model and row["rate_per_s"]), key=_rate)
        for share in ("p50", "p99"):
            values = [row[f"first_token_{share}_s"] for row in loaded]
            right.plot([_rate(row) for row in loaded], values, marker="o", label=f"{model}, {share}")
    left.set(ylabel="generated tokens a second, all requests at once")
    right.set(xlabel="requests a second", ylabel="time to first token, s", yscale="log")
    for axes in (left, right):
        axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _rate(row: Mapping[str, Any]) -> float:
    return float(row["rate_per_s"])
