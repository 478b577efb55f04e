"""Heat maps: how much of the answer comes back, by context and depth, a map for each side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # before pyplot looks for a display

from matplotlib import pyplot as plt

_COLUMNS = 3


def plot_maps(
    path: Path,
    title: str,
    contexts: Sequence[int],
    depths: Sequence[float],
    maps: Mapping[str, Sequence[Sequence[float]]],  # side: [context][depth] share of answer tokens that are right
) -> None:
    """Draw one map a side on a common scale and write them to `path`."""
    columns = min(_COLUMNS, len(maps))
    lines = -(-len(maps) // columns)
    size = (1.2 + 3.4 * columns, 0.8 + 2.7 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, (name, values) in zip(axes.flat, maps.items(), strict=False):
        image = axis.imshow(list(zip(*values, strict=True)), vmin=0, vmax=1, cmap="viridis", aspect="auto")
        axis.set_title(name, fontsize=9)
        axis.set_xticks(range(len(contexts)), [f"{context:,}" for context in contexts], fontsize=8)
        axis.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths], fontsize=8)
        for column, of_context in enumerate(values):
            for line, value in enumerate(of_context):
                # White on the dark end of the colours, black on the bright one.
                axis.text(column, line, f"{value:.0%}", ha="center", va="center", fontsize=7, color="wk"[value > 0.6])
    for axis in axes.flat[len(maps) :]:
        axis.axis("off")
    figure.supxlabel("context, tokens", fontsize=9)
    figure.supylabel("depth of the needle", fontsize=9)
    figure.colorbar(image, ax=axes, label="answer tokens right", shrink=0.9)
    figure.suptitle(title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)
