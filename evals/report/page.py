"""The page of the report: one HTML file with everything inside, and the same claims as Markdown."""

import base64
import html
import io
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from evals.report.claims import Claim
from evals.report.jobs import Outcome
from evals.report.rows import Found, newest

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1060px; margin: 2rem auto; padding: 0 1rem; color: #1c1c1c }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd } .sub { color: #666 }
table { border-collapse: collapse; width: 100%; font-size: 13.5px }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid #e6e6e6; vertical-align: top }
th { color: #555; font-weight: 600 } td.when { color: #666 }
.yes { color: #137333; font-weight: 600 } .no { color: #b3261e; font-weight: 600 } .none { color: #888 }
.card { display: inline-block; border: 1px solid #ddd; border-radius: 6px; padding: .5rem 1rem }
.card { margin: .3rem .6rem 0 0 }
figure { margin: 1.2rem 0 }
.card b { font-size: 1.4rem; display: block } img { max-width: 100%; margin: .6rem 0 } code { background: #f4f4f4 }
"""
_WORDS = {True: ("met", "yes"), False: ("missed", "no"), None: ("-", "none")}


class Plot(NamedTuple):
    """A picture of an eval."""

    eval: str
    caption: str
    url: str  # data:


def to_html(title: str, claims: Sequence[Claim], plots: Sequence[Plot], outcomes: Sequence[Outcome]) -> str:
    """Return the whole page: missed goals first, then each eval with its claims and pictures."""
    counts = [(word, sum(claim.is_met is met for claim in claims)) for met, (word, _) in _WORDS.items()]
    cards = "".join(f'<div class="card"><b>{n}</b>{"without a goal" if w == "-" else w}</div>' for w, n in counts)
    parts = [f"<h1>hf_kvopt: what was measured</h1><p class=sub>{html.escape(title)}</p>{cards}"]
    if missed := [claim for claim in claims if claim.is_met is False]:
        parts.append(f"<h2>missed</h2>{_html_table(missed)}")
    for name, group in groupby(claims, key=lambda claim: claim.eval):
        figures = "".join(_figure(plot) for plot in plots if plot.eval == name)
        parts.append(f"<h2>{html.escape(name)}</h2>{_html_table(list(group))}{figures}")
    if missing := _missing(outcomes):
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in missing)
        parts.append(f"<h2>not measured</h2><ul>{lines}</ul>")
    head = f'<meta charset="utf-8"><title>hf_kvopt report</title><style>{_STYLE}</style>'
    body = "\n".join(parts)
    return f'<!doctype html><html lang="en">{head}<body>{body}</body></html>\n'


def _html_table(claims: Sequence[Claim]) -> str:
    head = "<tr><th>claim</th><th>goal</th><th>measured</th><th></th><th>where</th><th>when, revision</th></tr>"
    return f"<table>{head}{''.join(map(_html_row, claims))}</table>"


def _figure(plot: Plot) -> str:
    text = html.escape(plot.caption)
    return f'<figure><img alt="{text}" src="{plot.url}"><figcaption class=sub>{text}</figcaption></figure>'


def _html_row(claim: Claim) -> str:
    word, color = _WORDS[claim.is_met]
    quick = " (quick run)" if claim.is_quick else ""
    cells = [html.escape(text) for text in (claim.claim, claim.goal, claim.measured)]
    when = html.escape(f"{claim.when} {claim.revision}{quick}")
    return (
        f"<tr><td>{cells[0]}</td><td>{cells[1]}</td><td>{cells[2]}</td><td class={color}>{word}</td>"
        f"<td>{html.escape(claim.where)}</td><td class=when>{when}</td></tr>"
    )


def to_markdown(title: str, claims: Sequence[Claim], outcomes: Sequence[Outcome]) -> str:
    """Return the claims as one table for each eval, for other pages."""
    lines = ["# What was measured", "", title, ""]
    for name, group in groupby(claims, key=lambda claim: claim.eval):
        lines += [f"## {name}", "", "| claim | goal | measured | | where | when |", "|---|---|---|---|---|---|"]
        for claim in group:
            quick = " (quick)" if claim.is_quick else ""
            cells = (claim.claim, claim.goal, claim.measured, _WORDS[claim.is_met][0], claim.where)
            lines.append(
                "| " + " | ".join(_cell(cell) for cell in cells) + f" | {claim.when} {claim.revision}{quick} |"
            )
        lines.append("")
    if missing := _missing(outcomes):
        lines += ["## not measured", "", *(f"- {line}" for line in missing), ""]
    return "\n".join(lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _missing(outcomes: Sequence[Outcome]) -> list[str]:
    return [f"{one.name}: {one.detail}; {one.command}" for one in outcomes if one.detail]


def plots_of(rows: Sequence[Found], folders: Sequence[Path]) -> list[Plot]:
    """Return pictures: the speed of each side by context, drawn here, and those that the evals drew."""
    plots = []
    if speed := _speed_plot([row for row in rows if row.eval == "speed"]):
        plots.append(Plot("speed", "decode step by context, milliseconds", speed))
    pictures = {path.stem: path for folder in folders for path in sorted(folder.glob("*.png"))}
    for name, path in sorted(pictures.items()):
        plots.append(Plot(name.split("-")[0], name, _data_url(path.read_bytes())))
    return plots


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _speed_plot(rows: Sequence[Found]) -> str | None:
    latest = newest(rows, "model", "side", "context", "batch", "dtype")
    alone = [row.fields for row in latest if row.fields.get("batch") == 1]
    if not alone:
        return None
    models = sorted({str(f["model"]) for f in alone})
    figure = Figure(figsize=(6.6 * len(models), 3.4), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        for side in sorted({f["side"] for f in alone if f["model"] == model}):
            points = sorted((f["context"], f["step_ms"]) for f in alone if f["model"] == model and f["side"] == side)
            axes.plot([x for x, _ in points], [y for _, y in points], "o-", label=side)
        axes.set(title=model, xlabel="context, tokens", ylabel="ms", ylim=(0, None))
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return _data_url(buffer.getvalue())
