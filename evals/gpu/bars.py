"""Target figures for one H200, each beside the measured value."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

Row = dict[str, Any]
LARGE = 1e9  # bytes of keys and values from which the decode figures hold


class Bar(NamedTuple):
    """One figure: the worst of its rows, None if no row was measured."""

    name: str
    asked: float
    measured: float | None

    @property
    def verdict(self) -> str:
        """Verdict in words: "met", "missed" or "not measured"."""
        if self.measured is None:
            return "not measured"
        return "met" if self.measured >= self.asked else "missed"


def bars(rows: list[Row]) -> list[Bar]:
    """Return every figure."""
    prefill = [
        row for row in rows if row.get("bench") == "prefill" and row["head_dim"] == 128 and row["length"] >= 4096
    ]
    decode = [row for row in rows if row.get("bench") == "decode"]
    large = {(r["batch"], r["length"]) for r in decode if r["format"] == "native" and r.get("bytes", 0) >= LARGE}
    of = {
        name: [row for row in decode if row["format"] == name and (row["batch"], row["length"]) in large]
        for name in ("native", "fp8_e4m3", "int8", "int4")
    }
    found = [
        Bar(
            "prefill bf16, head_dim 128, causal, from 4k: over cuDNN", 1.0, _least(_over_cudnn(row) for row in prefill)
        ),
        Bar("decode bf16, KV from 1 GB: share of the copy", 0.9, _least(_share(row) for row in of["native"])),
        Bar(
            "decode bf16, KV from 1 GB: over the best peer", 1.0, _least(r.get("over_best_peer") for r in of["native"])
        ),
    ]
    for name, asked in (("fp8_e4m3", 1.8), ("int8", 1.8), ("int4", 3.0)):
        found.append(Bar(f"decode {name} over bf16", asked, _least(row.get("over_bf16") for row in of[name])))
    speeds = {
        row["side"]: row["tokens_s"]
        for row in rows
        if row.get("bench") == "generate" and "tokens_s" in row and (row["batch"], row["prompt"]) == (8, 8192)
    }
    ours, static = speeds.get("PagedCache compiled"), speeds.get("StaticCache compiled")
    ratio = ours / static if ours and static else None
    return [*found, Bar("generate(), batch 8, 8k: over StaticCache compiled", 1.3, ratio)]


def _least(values: Iterable[float | None]) -> float | None:
    """Return the least value; None if there is none, or if one is missing."""
    found = list(values)
    known = [value for value in found if value is not None]
    return min(known) if known and len(known) == len(found) else None


def _share(row: Row) -> float | None:
    share: float | None = row.get("sides", {}).get("ours", {}).get("share")
    return share


def _over_cudnn(row: Row) -> float | None:
    sides = row.get("sides", {})
    cudnn, ours = (sides.get(name, {}).get("ms") for name in ("sdpa cudnn", "ours"))
    return cudnn / ours if cudnn and ours else None


def markdown(rows: list[Row], limits: dict[str, float]) -> str:
    """Return the tables in Markdown: the figures, then every measurement."""
    lines = [
        f"Copy {limits['copy_gb_s']:.0f} GB/s, bf16 product {limits['matmul_tflop_s']:.0f} TFLOP/s in this run.", "",
        "| figure | asked | measured | |", "|---|---:|---:|---|",
    ]  # fmt: skip
    for bar in bars(rows):
        measured = "" if bar.measured is None else f"{bar.measured:.2f}"
        lines.append(f"| {bar.name} | {bar.asked} | {measured} | {bar.verdict} |")
    lines += ["", "| what | ours | share of the card's own | over the best peer |", "|---|---|---|---|"]
    for row in rows:
        ours = row.get("sides", {}).get("ours", {})
        if "ms" in ours:
            rate = f"{ours['tflop_s']:.0f} TFLOP/s" if "tflop_s" in ours else f"{ours['gb_s']:.0f} GB/s"
            what = ", ".join(str(row[key]) for key in ("bench", "head_dim", "batch", "length", "format") if key in row)
            ratio = "" if row.get("over_best_peer") is None else f"{row['over_best_peer']:.2f}x"
            lines.append(f"| {what} | {rate} | {ours['share']:.0%} | {ratio} |")
        elif "tokens_s" in row:
            what = f"generate, {row['side']}, batch {row['batch']}, prompt {row['prompt']}"
            lines.append(f"| {what} | {row['tokens_s']:.0f} tokens/s | | |")
    return "\n".join(lines + _complaints(rows))


def _complaints(rows: list[Row]) -> list[str]:
    """Return a line for each row that failed or was not measured."""
    lines = []
    for row in rows:
        reason = row.get("skipped") or row.get("unavailable") or row.get("error")
        if row.get("passed") is False or reason:
            keys = ("check", "warm", "bench", "side", "head_dim", "batch", "length", "prompt", "format")
            what = ", ".join(str(row[key]) for key in keys if key in row)
            lines.append(f"- {what}: {'FAILED ' if row.get('passed') is False else ''}{reason or ''}".rstrip())
    return ["", *lines] if lines else []
