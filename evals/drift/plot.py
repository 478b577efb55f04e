"""The picture of drift: KL divergence over the distance from the prompt, a curve for each side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot looks for a display

from matplotlib import pyplot as plt

_POINTS = 25


def plot_drift(path: Path, title: str, curves: Mapping[str, Sequence[float]]) -> None:
    """Draw the mean KL divergence of stretches of the answer, one curve for each side, and write it to `path`."""
    figure, axes = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
    for name, values in curves.items():
        width = -(-len(values) // _POINTS)
        stretches = [values[i : i + width] for i in range(0, len(values), width)]
        middles = [i * width + len(part) / 2 for i, part in enumerate(stretches)]
        axes.plot(middles, [sum(part) / len(part) for part in stretches], "o-", markersize=3, label=name)
    axes.set(xlabel="tokens behind the prompt", ylabel="mean KL divergence of the next token, nats", title=title)
    axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
