"""Plot of memory against context: one line for each format, with the weights below and the budget above."""

import importlib
from pathlib import Path
from typing import Any

from hf_kvopt.plan import BadInput, MemoryReport, memory

_FORMATS = ("native", "int8", "k8v4", "int4")
_POINTS = 24


def save_plot(path: Path, model: str, settings: dict[str, Any], report: MemoryReport) -> None:
    """Draw the memory of `report`'s model up to four times its context, and write the picture to `path`.

    Raises:
        BadInput: matplotlib is not installed, or the file cannot be written.
    """
    figure_module = _matplotlib()
    contexts = sorted({max(1, round(report.context * 4 * (i + 1) / _POINTS)) for i in range(_POINTS)})
    weights = (report.weight_bytes or 0) / 1e9
    figure = figure_module.Figure(figsize=(7.5, 4.5), layout="constrained")
    axes = figure.subplots()
    plain = settings | {"device": None, "budget": None, "weights": False, "prompt": None, "max_tokens": None}
    formats = dict.fromkeys((*_FORMATS, report.format)) if report.cache == "paged" else (report.format,)
    for name in formats:
        if name != report.format and not _is_taken(model, plain | {"format": name}):
            continue
        sizes = [memory(model, **plain | {"context": n, "format": name}).total_bytes / 1e9 + weights for n in contexts]
        axes.plot(contexts, sizes, label=name, linewidth=2.5 if name == report.format else 1.2)
    if weights:
        axes.axhspan(0, weights, color="0.9", label="weights")
    if report.capacity is not None:
        axes.axhline(report.capacity.budget_bytes / 1e9, color="black", linestyle="--", label="budget")
    axes.axvline(report.context, color="0.6", linewidth=0.8)
    axes.set(
        xlabel="context, tokens a row",
        ylabel="GB",
        title=f"{Path(model).name}: weights and KV at batch {report.batch}, {report.cache} cache",
        xlim=(0, contexts[-1]),
        ylim=(0, None),
    )
    ticks = [report.context * n for n in (0, 0.5, 1, 2, 3, 4)]
    axes.set_xticks(ticks, [f"{n / 1024:g}k" if n % 256 == 0 and n else f"{n:,.0f}" for n in ticks])
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    if path.is_dir():
        raise BadInput(f"cannot write the plot to {str(path)!r}: it is a folder; for example --plot memory.png")
    try:
        figure.savefig(path, dpi=130)
    except (OSError, ValueError) as error:
        raise BadInput(f"cannot write the plot to {str(path)!r}: {error}; for example --plot memory.png") from error


def _is_taken(model: str, settings: dict[str, Any]) -> bool:
    """Return whether the model's cache can be stored so: latents refuse some formats."""
    try:
        memory(model, **settings | {"context": 1})
    except BadInput:
        return False
    return True


def _matplotlib() -> Any:
    try:
        return importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise BadInput("--plot needs matplotlib: got none; pip install 'hf-kvopt[evals]', or drop --plot") from error
