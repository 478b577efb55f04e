"""`python -m hf_kvopt plan MODEL`: settings to choose, reasons, predictions; `--check` measures them here."""

import argparse
import sys
from collections.abc import Sequence

from hf_kvopt.cli.check import Checked, check
from hf_kvopt.cli.screen import Parser, as_json, model_parser, pairs, table
from hf_kvopt.plan import WORKLOADS, Choice, Plan, plan, show_bytes
from hf_kvopt.plan.inputs import show_number
from hf_kvopt.plan.layout import MOST_DEVICES

_EXAMPLES = """examples:
  python -m hf_kvopt plan meta-llama/Llama-3.1-8B --device H200 --context 32k --batch 8 --workload agent
  python -m hf_kvopt plan ./model --device cpu --context 4k --workload document --check"""


def make_parser() -> Parser:
    """Build the parser of the command line."""
    about = "Choose attention, cache, format, sharing, speculation, compilation and parallelism, with reasons."
    parser = model_parser("plan", about, _EXAMPLES, context="32k")
    parser.set_defaults(device="auto")
    parser.add_argument("--workload", default="chat", help=f"{', '.join(WORKLOADS)} (%(default)s)")
    goal = parser.add_mutually_exclusive_group()
    goal.add_argument("--latency", dest="goal", action="store_const", const="latency", default="latency")
    goal.add_argument("--throughput", dest="goal", action="store_const", const="throughput")
    parser.add_argument("--head", action="store_true", help="a trained draft head for this model is at hand")
    parser.add_argument("--check", action="store_true", help="measure the choice against the default here")
    return parser


def run(args: argparse.Namespace) -> int:
    """Plan, print, and measure if asked to; return 1 if a check finds tokens that differ from the default's."""
    question = {name: value for name, value in vars(args).items() if name not in ("model", "json", "check")}
    made = plan(args.model, **question)
    checked = check(args.model, made) if args.check else None
    if args.json:
        print(as_json(made.to_json() | ({"check": checked.to_json()} if checked else {})))
    else:
        print(_text(args.model, made))
        if checked is not None:
            print("\n" + _check_text(checked))
    return int(checked is not None and checked.is_equal is False)


def _text(model: str, made: Plan) -> str:
    many = f" x {made.num_devices}" if made.num_devices > 1 else ""
    title = (
        f"{model}: {made.model_type}, {made.dtype}, on {made.device.name}{many}; {made.workload} for {made.goal}, "
        f"batch {made.batch} x {made.context:,} tokens"
    )
    parts = [title, *(_choice(choice) for choice in made.choices)]
    parts.append(table(_predicted(made), ("predicted", "this plan", "default")))
    needs = made.predicted.default_num_devices
    if needs is None or needs > made.num_devices:
        many = f"needs {needs} such devices" if needs else f"does not fit {MOST_DEVICES} such devices"
        does = many if made.device.is_gpu else "does not fit this machine"
        parts.append(f"The default's cache {does}; it is timed here as if it fitted.")
    parts.append("Assumed:\n" + "\n".join(f"  {line}" for line in made.assumptions))
    parts.append("Do it:\n\n" + "\n".join(f"    {line}" for line in made.code))
    return "\n\n".join(parts)


def _choice(one: Choice) -> str:
    lines = [f"{one.topic}: {one.choice}", f"    because {one.reason}", f"    gain: {one.gain}"]
    return "\n".join(lines + [f"    not {other}" for other in one.rejected])


def _predicted(made: Plan) -> list[tuple[object, ...]]:
    p = made.predicted
    rows: list[tuple[object, ...]] = [
        ("weights", show_bytes(p.weight_bytes), show_bytes(p.weight_bytes)),
        ("KV cache of this batch", show_bytes(p.kv_bytes), show_bytes(p.default_kv_bytes)),
        ("KV cache at most", show_bytes(p.most_kv_bytes), show_bytes(p.default_kv_bytes)),
        ("first token, s", show_number(p.first_token_ms / 1e3), show_number(p.default_first_token_ms / 1e3)),
        ("step, ms", show_number(p.step_ms), show_number(p.default_step_ms)),
        ("tokens a row and step", f"{p.accepted:g}", "1"),
        ("request, s", show_number(p.request_s), show_number(p.default_request_s)),
        ("speed-up of a request", f"{show_number(p.gain)}x", "1x"),
    ]
    return rows


def _check_text(checked: Checked) -> str:
    rows = [(line.what, line.predicted, line.measured, f"{line.ratio:.2f}x") for line in checked.lines]
    facts = [
        ("measured on", checked.where),
        ("with", checked.how),
        ("tokens equal to the default's", {True: "yes", False: "NO", None: "not compared"}[checked.is_equal]),
    ]
    shown = table(rows, ("check", "predicted", "measured", "measured/predicted"))
    return "\n\n".join([pairs(facts), shown, *(f"note: {note}" for note in checked.notes)])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
