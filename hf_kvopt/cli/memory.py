"""`python -m hf_kvopt memory MODEL`: KV memory from the config alone, and the capacity of a device or a budget."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_kvopt.cli.memory_plot import save_plot
from hf_kvopt.cli.screen import Parser, as_json, model_parser, pairs, table, whole_number
from hf_kvopt.plan import BadInput, Capacity, LayerMemory, MemoryReport, memory, show_bytes
from hf_kvopt.plan.capacity import CARD_SHARE
from hf_kvopt.plan.kv_bytes import CACHES
from hf_kvopt.quant import KV_FORMATS

_COLUMNS = ("layers", "stores", "keys", "values", "format", "bytes/token each")
_EXAMPLES = """examples:
  python -m hf_kvopt memory meta-llama/Llama-3.1-8B --context 32k --batch 8 --device H200
  python -m hf_kvopt memory ./config.json --context 128k --format k8v4 --budget 24GiB --plot memory.png

32k means 32 x 1,024 tokens; 24GiB is 24 x 1,024^3 bytes, 24GB is 24 x 1,000^3."""


def make_parser() -> Parser:
    """Build the parser of the command line."""
    about = "KV memory of a model from its config alone: no weights, nothing else downloaded."
    parser = model_parser("memory", about, _EXAMPLES, context="4096")
    parser.add_argument("--prompt", help="tokens of the first forward; decides what sliding layers hold just then")
    parser.add_argument("--encoder-context", help="tokens of the encoder (--context, or the model's fixed number)")
    parser.add_argument("--cache", default="paged", help=f"{', '.join(CACHES)} (%(default)s)")
    parser.add_argument("--format", default="native", help=f"{', '.join(KV_FORMATS)} (%(default)s)")
    parser.add_argument("--block-size", type=whole_number, default=16, help="tokens a block (%(default)s)")
    parser.add_argument("--max-tokens", help="the paged cache's cap over all rows")
    parser.add_argument("--no-weights", action="store_true", help="count the cache alone")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw memory against context (needs matplotlib)")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compute the report, print it, and draw it if asked to."""
    settings = _settings(args)
    report = memory(args.model, **settings)
    if args.plot is not None:
        save_plot(args.plot, args.model, settings, report)
    print(as_json(report.to_json()) if args.json else _text(args, report), flush=True)
    _require_room(report)
    return 0


def _require_room(report: MemoryReport) -> None:
    """Raise BadInput, after the report was printed, if the weights leave no room for a cache."""
    room, weights = report.capacity, report.weight_bytes
    if room is not None and weights is not None and room.kv_budget_bytes <= 0:
        raise BadInput(
            f"budget of {show_bytes(room.budget_bytes)} is impossible: the weights alone take {show_bytes(weights)}; "
            f"expected more, for example --budget {-(-weights * 5 // 4 // 2**30)}GiB, or a quantized model"
        )


_NOT_ASKED = ("model", "plot", "json", "no_weights")


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `memory`, which have the names of the options."""
    return {k: v for k, v in vars(args).items() if k not in _NOT_ASKED} | {"weights": not args.no_weights}


def _text(args: argparse.Namespace, report: MemoryReport) -> str:
    parts = [_title(args.model, report), table(_layer_rows(report.layers), _COLUMNS)]
    parts.append(pairs(_totals(report)))
    if report.capacity is not None:
        budget = "budget" if args.budget is not None else f"budget, {CARD_SHARE:g} of {args.device}"
        parts.append(pairs([(budget, _both(report.capacity.budget_bytes)), *_capacity(report.capacity, report)]))
    parts += ["\n".join(f"note: {note}" for note in report.notes)] * bool(report.notes)
    return "\n\n".join(parts)


def _title(model: str, report: MemoryReport) -> str:
    block = f", blocks of {report.block_size}" if report.block_size else ""
    return (
        f"{model}: {report.model_type}, {report.attention}\n{report.cache} cache, {report.format}{block}, "
        f"{report.dtype}; batch {report.batch} x {report.context:,} tokens"
    )


def _layer_rows(layers: Sequence[LayerMemory]) -> list[tuple[object, ...]]:
    """Return one row for each group of equal layers."""
    groups: dict[LayerMemory, list[int]] = {}
    for i, layer in enumerate(layers):
        groups.setdefault(layer, []).append(i)
    rows: list[tuple[object, ...]] = []
    for layer, where in groups.items():
        stores = layer.kind + (f", window {layer.window:,}" if layer.window else "")
        if layer.bytes_per_token:
            shapes = [f"{heads} x {dim}" for heads, dim in (layer.key_shape, layer.value_shape)]
            rows.append((_numbers(where), stores, *shapes, layer.format, f"{layer.bytes_per_token:,}"))
        else:
            rows.append((_numbers(where), stores, "-", "-", "-", "0"))
    return rows


def _numbers(where: Sequence[int]) -> str:
    if len(where) > 1 and where == list(range(where[0], where[-1] + 1)):
        return f"{where[0]}-{where[-1]} ({len(where)})"
    listed = ", ".join(map(str, where))
    return listed if len(listed) <= 24 else f"{where[0]}, {where[1]} ... {where[-1]} ({len(where)})"


def _totals(report: MemoryReport) -> list[tuple[str, object]]:
    rows: list[tuple[str, object]] = [("per token of a row, all layers that keep it", f"{report.bytes_per_token:,} B")]
    if report.scale_bytes_per_token:
        rows.append(("  of which scales", f"{report.scale_bytes_per_token:,} B"))
    rows.append(("KV cache", _both(report.used_bytes)))
    if report.cross_used_bytes:
        rows.append((f"cross-attention, {report.encoder_context:,} tokens", _both(report.cross_used_bytes)))
    if report.slack_bytes:
        rows.append(("  of which block slack", show_bytes(report.slack_bytes)))
    reserved = report.reserved_bytes + report.cross_reserved_bytes
    if report.cache == "paged" and reserved != report.used_bytes + report.cross_used_bytes:
        rows.append(("reserved as pools grow ahead", _both(reserved)))
    if report.stock_bytes:
        rows.append(("layers kept by transformers", _both(report.stock_bytes)))
    if report.weight_bytes is not None and report.num_parameters is not None:
        rows.append((f"weights, {report.num_parameters / 1e6:,.1f} M parameters", _both(report.weight_bytes)))
        rows.append(("weights + KV", _both(report.total_bytes)))
    return rows


def _capacity(room: Capacity, report: MemoryReport) -> list[tuple[str, object]]:
    lacking = room.needed_bytes - max(0, room.kv_budget_bytes)
    verdict = "fits" if room.fits else f"does not fit: {show_bytes(lacking)} too much"
    if room.kv_budget_bytes <= 0:
        left = f"none: the weights alone take {show_bytes(-room.kv_budget_bytes)} more than the budget"
    else:
        left = _both(room.kv_budget_bytes)
    context = _most(room.max_context, room.capped_context, "token")
    limit = report.max_positions
    if limit is not None and (room.capped_context is None or room.capped_context > limit):
        context += f"; the model is made for {limit:,}"
    return [
        ("left for KV", left),
        (f"batch {report.batch} x {report.context:,} tokens", f"{_both(room.needed_bytes)}: {verdict}"),
        (f"largest context at batch {report.batch}", context),
        (f"largest batch at {report.context:,} tokens", _most(room.max_batch, room.capped_batch, "row")),
    ]


def _most(as_asked: int | None, capped: int | None, unit: str) -> str:
    """Format the capacity as the cache was asked for, and with max_tokens set to what is needed."""
    shown = _count(as_asked, unit)
    return shown if capped == as_asked else f"{shown}, {_count(capped, unit)} with max_tokens set to just these"


def _count(number: int | None, unit: str) -> str:
    if number is None:
        return "no limit"
    return f"{number:,} {unit}{'s' * (number != 1)}" if number else "none"


def _both(size: float) -> str:
    return f"{show_bytes(size)} ({size / 1e9:,.2f} GB)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
