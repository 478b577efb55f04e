"""The picture of the trade: loss against bytes per token."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # before pyplot looks for a display

from matplotlib import pyplot as plt

_RUINED = 0.05


class Point(NamedTuple):
    """One side at one chunk size; losses are shares."""

    name: str
    chunk: int
    bytes_per_token: float
    delta: float
    low: float
    high: float
    kl_mean: float


def plot_trade(path: Path, title: str, points: Sequence[Point]) -> None:
    """Draw ΔPPL with its interval, and KL divergence, over bytes per token, and write it to `path`."""
    figure, (loss, divergence) = plt.subplots(1, 2, sharex=True, figsize=(11, 4.6), layout="constrained")
    chunks = sorted({point.chunk for point in points})
    names = list(dict.fromkeys(point.name for point in points))
    for point in points:
        style = {"color": f"C{names.index(point.name)}", "marker": "os^Dv<>"[chunks.index(point.chunk) % 7]}
        kib = point.bytes_per_token / 1024
        label = point.name if point.chunk == chunks[0] else None
        error = [[100 * (point.delta - point.low)], [100 * (point.high - point.delta)]]
        loss.errorbar(kib, 100 * point.delta, yerr=error, capsize=3, linestyle="", label=label, **style)
        if point.kl_mean > 0:
            divergence.plot(kib, point.kl_mean, linestyle="", label=label, **style)
    for i, chunk in enumerate(chunks if len(chunks) > 1 else ()):
        loss.plot([], [], linestyle="", color="grey", marker="os^Dv<>"[i % 7], label=f"chunks of {chunk}")
    loss.axhline(0, color="grey", linewidth=0.8)
    loss.set_ylabel("ΔPPL against the baseline, % (bars: 95 % bootstrap)")
    if max(abs(point.delta) for point in points) > _RUINED:
        # Linear about zero, where the good ones lie; the bad ones are orders of magnitude away.
        loss.set_yscale("symlog", linthresh=1.0)
    divergence.set_ylabel("mean KL divergence of the next token, nats")
    divergence.set_yscale("log")
    for axes in (loss, divergence):
        axes.set_xlabel("KV cache, KiB per token (scales and block slack counted)")
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    loss.legend(fontsize=8)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
