"""The picture of the trade on every model: what a cache loses against the bytes that it takes.

A point is one cache. The line joins those of this library that no other of its caches beats in both. Bytes are counted
at 32k tokens by the arithmetic of `hf_kvopt.plan.memory`, and for caches of transformers as they were at the end of the
segments.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from evals.report.rows import Fields, Found, newest

_LEAST_KL = 1e-5  # below it nothing but rounding is seen


def latest_losses(rows: Iterable[Found]) -> dict[str, list[Fields]]:
    """Return the newest readings of whole texts, by model and text; the smallest chunk size that all sides share."""
    own = [row for row in rows if row.eval == "perplexity" and not row.fields.get("prefill") and not row.is_quick]
    panels: dict[str, list[Fields]] = {}
    for row in newest(own, "model", "corpus", "side", "chunk"):
        f = row.fields
        if f["side"] != f["baseline"]:
            panels.setdefault(f"{f['model']}, {f.get('corpus') or f.get('dataset') or 'programs'}", []).append(f)
    return {name: _one_chunk(found) for name, found in sorted(panels.items())}


def _one_chunk(found: Sequence[Fields]) -> list[Fields]:
    """Keep the chunk size at which most sides were read, the smallest where several are."""
    counts = {f["chunk"]: sum(g["chunk"] == f["chunk"] for g in found) for f in found}
    chunk = min(counts, key=lambda size: (-counts[size], size))
    return [f for f in found if f["chunk"] == chunk]


def share(fields: Fields) -> float:
    """Return the bytes of a row's cache over those of bfloat16."""
    return float(fields.get("bf16_share_32k") or fields["bf16_share"])


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points (bytes, loss) that no other beats in both, from the smallest cache on."""
    best: list[tuple[float, float]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    return best


def plot_losses(path: Path, rows: Iterable[Found]) -> None:
    """Draw KL divergence over bytes, a panel for each model and text, and write it to `path`; nothing without rows."""
    panels = latest_losses(rows)
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure = Figure(figsize=(5.2 * columns, 4.0 * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False, sharex=True, sharey=True)
    for axes, (name, found) in zip(grid.flat, panels.items(), strict=False):
        for is_ours, marker in ((True, "o"), (False, "x")):
            mine = [f for f in found if f["side"].endswith("+hf_kvopt") is is_ours]
            points = [(share(f), max(f["kl_mean"], _LEAST_KL)) for f in mine]
            if points:
                colour, label = ("C0", "hf_kvopt") if is_ours else ("C1", "transformers")
                axes.plot(*zip(*points, strict=True), marker, color=colour, label=label)
            if points and is_ours:
                axes.plot(*zip(*front(points), strict=True), color="C0", linewidth=1, alpha=0.6)
            for (x, y), f in zip(points, mine, strict=True):
                text = f["side"].split("+")[0].removeprefix("transformers_")
                axes.annotate(text, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
        chunk = found[0]["chunk"]
        axes.set(title=f"{name},\nchunks of {chunk}", yscale="log")
        axes.margins(x=0.12, y=0.1)  # for the names beside the points
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    figure.supxlabel("bytes of the cache, of bfloat16's")
    figure.supylabel("mean KL divergence of the next token, nats")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
