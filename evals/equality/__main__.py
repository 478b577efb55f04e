"""`python -m evals.equality`: tokens and logits of sides against a baseline, over scenarios of generate().

In float32 every token must be equal and no logit may move by more than rounding; otherwise the exit status is 1. In
bfloat16 and float16 a correct path still diverges from the baseline at a near tie (products of another shape round
differently), so the first divergence is reported with the margin between the two best logits.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from evals._common.cli import Parser, add_output_argument, at_least
from evals._common.models import Subject, add_model_arguments, check_length, load_subject
from evals._common.noise import LOGIT_NOISE
from evals._common.prompts import add_text_arguments, load_texts, text_facts, token_stream
from evals._common.rows import append_rows, provenance
from evals._common.screen import Advance, progress, show_table
from evals._common.sides import Side, add_sides_argument, parse_side
from evals.equality.compare import Comparison, compare
from evals.equality.scenario import SCENARIOS, Run, Scenario, make_prompts, run_scenario


class Result(NamedTuple):
    """Comparison of one side in one scenario."""

    side: Side
    scenario: Scenario
    comparison: Comparison


def make_parser() -> Parser:
    """Build the parser of the command line."""
    names = [scenario.name for scenario in SCENARIOS]
    parser = Parser("evals.equality", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser)
    add_sides_argument(parser, "paged+hf_kvopt", "paged+sdpa")
    parser.add_argument("--baseline", default="dynamic+sdpa", help="cache+attention (%(default)s)")
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names, help="all")
    parser.add_argument("--prompt-len", type=at_least(1), default=45, help="tokens (%(default)s)")
    parser.add_argument("--new-tokens", type=at_least(1), default=48, help="%(default)s")
    parser.add_argument("--seed", type=at_least(0), default=0)
    add_output_argument(parser, "equality.json")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show and write; return 1 if a float32 comparison differs."""
    baseline, *sides = [parse_side(text) for text in [args.baseline, *args.sides]]
    subject = load_subject(args)
    check_length(subject, args.prompt_len + args.new_tokens)
    scenarios = [scenario for scenario in SCENARIOS if scenario.name in args.scenarios]
    with progress(len(scenarios) * (1 + len(sides))) as advance:
        results = []
        for result in _results(args, subject, baseline, sides, scenarios, advance):
            results.append(result)
            append_rows(args.out, [_row(args, subject, baseline, result)])  # a run that is cut off keeps them
    must_equal = args.dtype == "float32"
    _show(args, subject, baseline, results, must_equal)
    return int(must_equal and not all(result.comparison.is_equal for result in results))


def _results(
    args: argparse.Namespace,
    subject: Subject,
    baseline: Side,
    sides: Sequence[Side],
    scenarios: Sequence[Scenario],
    advance: Advance,
) -> Iterator[Result]:
    most_prompts = max(len(scenario.prompt_shares) for scenario in SCENARIOS)
    stream = token_stream(subject, load_texts(args), args.prompt_len * most_prompts, args.seed)
    for scenario in scenarios:
        expected = _run_side(args, subject, baseline, scenario, stream)
        advance(f"{scenario.name} {baseline}")
        for side in sides:
            got = _run_side(args, subject, side, scenario, stream)
            advance(f"{scenario.name} {side}")
            yield Result(side, scenario, compare(expected, got, LOGIT_NOISE[args.dtype]))


def _run_side(args: argparse.Namespace, subject: Subject, side: Side, scenario: Scenario, stream: Any) -> Run:
    model = side.attend(subject.model)
    pad_token_id = _pad_token_id(subject)
    return run_scenario(
        model,
        side.make_cache(model, args.prompt_len + args.new_tokens),
        scenario,
        make_prompts(scenario, stream, args.prompt_len, pad_token_id),
        new_tokens=args.new_tokens,
        pad_token_id=pad_token_id,
        seed=args.seed,
    )


def _pad_token_id(subject: Subject) -> int:
    """Return the padding id: the mask hides it, so any serves if the tokenizer has none."""
    of_tokenizer = getattr(subject.tokenizer, "pad_token_id", None)
    return of_tokenizer if of_tokenizer is not None else 0


def _row(args: argparse.Namespace, subject: Subject, baseline: Side, result: Result) -> dict[str, Any]:
    comparison = result.comparison
    divergence = comparison.divergence
    return {
        "eval": "equality",
        "model": subject.name,
        "side": str(result.side),
        "baseline": str(baseline),
        "scenario": result.scenario.name,
        "dtype": args.dtype,
        **text_facts(args),
        "prompt_len": args.prompt_len,
        "new_tokens": args.new_tokens,
        "seed": args.seed,
        "is_equal": comparison.is_equal,
        "num_tokens": comparison.num_tokens,
        "num_equal": comparison.num_equal,
        "max_logit": comparison.max_logit,
        "max_logit_delta": comparison.max_logit_delta,
        "first_divergence": divergence._asdict() if divergence is not None else None,
        **provenance(subject.model.device),
    }


def _show(
    args: argparse.Namespace, subject: Subject, baseline: Side, results: Sequence[Result], must_equal: bool
) -> None:
    columns = [
        "side",
        "scenario",
        "tokens equal",
        "max |Δlogit|",
        "first divergence",
        "top-2 margin",
        "verdict",
    ]
    lines = []
    for side, scenario, comparison in results:
        divergence = comparison.divergence
        lines.append(
            [
                side,
                scenario.name,
                f"{comparison.num_equal}/{comparison.num_tokens}",
                f"{comparison.max_logit_delta:.1e}",
                "-" if divergence is None else f"row {divergence.row}, token {divergence.step}",
                "-" if divergence is None else f"{divergence.margin:.2e}",
                "equal" if comparison.is_equal else "DIFFERS" if must_equal else "parts",
            ]
        )
    show_table(f"{subject.name} in {args.dtype} against {baseline}", columns, lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
