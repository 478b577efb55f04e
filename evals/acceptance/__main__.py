"""`python -m evals.acceptance`: accepted length and speed-up of speculation against plain and assisted generate().

Greedy tokens are compared first, for all prompts: a side that differs gets no row, and the exit status is 1.
Sides run turn by turn over the same held-out prompts; the costs of drafts and of verifications are reported apart.
"""

import argparse
import copy
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import hf_kvopt
from evals._common.cli import BadArgumentError, Parser, add_output_argument, at_least
from evals._common.models import Subject, add_model_arguments, load_subject
from evals._common.prompts import add_text_arguments, corpus_of, load_texts, pad_left
from evals._common.rows import append_rows, provenance
from evals._common.screen import progress, show_table
from evals.acceptance.assistant import Assistant, of_own_layers
from evals.acceptance.measure import differing, row_of, time_sides
from evals.acceptance.plot import draw
from evals.acceptance.sides import Side, make_sides
from evals.reference_model import MODEL_PATH

_HEADS = ("eagle3", "medusa")
_ASSISTANT_LAYERS = 4


class Bar(NamedTuple):
    """Goal of the bundled EAGLE-3 head on the reference model, greedy."""

    metric: str
    batch: int
    least: float


BARS = (Bar("mean_accepted_length", 1, 3.0), Bar("speedup_dynamic", 1, 1.6), Bar("speedup_dynamic", 8, 1.2))


def bars_of(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the bars of a row, with the value it reached."""
    is_judged = row["side"] == "eagle3" and not row["temperature"]
    return [
        {"metric": bar.metric, "least": bar.least, "value": row[bar.metric], "met": row[bar.metric] >= bar.least}
        for bar in BARS if is_judged and bar.batch == row["batch"] and bar.metric in row
    ]  # fmt: skip


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser("evals.acceptance", description=(__doc__ or "").split("\n\n")[0])
    add_model_arguments(parser)
    add_text_arguments(parser)
    parser.add_argument("--heads", nargs="*", help="paths or hub ids of draft heads (those of the reference model)")
    parser.add_argument(
        "--assistant", help="path or hub id of an assistant model (some of the reference model's layers)"
    )
    parser.add_argument("--batches", nargs="+", type=at_least(1), default=[1, 4, 8], help="rows (1 4 8)")
    parser.add_argument("--prompts", type=at_least(1), default=8, help="held-out prompts, in batches (%(default)s)")
    parser.add_argument("--prompt-tokens", type=at_least(1), default=128, help="%(default)s")
    parser.add_argument("--new-tokens", type=at_least(2), default=128, help="%(default)s")
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 1.0], help="0 is greedy (0 1)")
    parser.add_argument("--repeats", type=at_least(1), default=3, help="%(default)s")
    parser.add_argument("--plot", type=Path, help="PNG file (beside --out)")
    add_output_argument(parser, "acceptance.json")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, show and write; return 1 if a side differs."""
    subject = load_subject(args)
    dense, paged = subject.model, copy.deepcopy(subject.model)
    paged.set_attn_implementation(hf_kvopt.ATTENTION_NAME)
    prompts = _prompts(args, subject)
    assistant = _assistant(args, dense)
    sides = make_sides(dense, paged, {**_heads(args), "prompt lookup": "prompt_lookup", "lookahead": "lookahead"},
                       assistant)  # fmt: skip
    facts = {"eval": "acceptance", "model": subject.name, "dtype": args.dtype, **provenance(subject.model.device)}
    rows: list[dict[str, Any]] = []
    faults: dict[str, str] = {}
    with progress(len(args.batches) * len(args.temperatures) * len(sides) * args.repeats) as advance:
        for size in args.batches:
            batches = _batches(prompts, size, dense)
            these = [side for side in sides if size == 1 or not side.one_row]
            settings = {"max_new_tokens": args.new_tokens, "eos_token_id": None, "pad_token_id": 0}
            wrong = differing(these, batches, settings)
            faults |= {f"{name}, batch {size}": fault for name, fault in wrong.items()}
            agreed = [side for side in these if side.name not in wrong]
            for temperature in args.temperatures:
                sampling = {**settings, **_sampling(temperature)}
                measured = _measure(args, agreed, batches, sampling, advance, temperature)
                append_rows(args.out, [{**row, "bars": bars_of(row), **facts} for row in measured])
                rows += measured
    _show(subject, rows, faults)
    draw(rows, args.plot or args.out.with_suffix(".png"))
    return int(bool(faults))


def _measure(
    args: argparse.Namespace, sides: Sequence[Side], batches: Sequence[Mapping[str, Tensor]],
    settings: Mapping[str, Any], advance: Any, temperature: float,
) -> list[dict[str, Any]]:  # fmt: skip
    measured = time_sides(sides, batches, settings, args.repeats, advance)
    baselines = {"dynamic": measured[sides[0].name], "paged": measured.get(sides[1].name, measured[sides[0].name])}
    facts = {
        "batch": len(batches[0]["input_ids"]),
        "temperature": temperature,
        "prompt_tokens": args.prompt_tokens,
        "new_tokens": args.new_tokens,
        "prompts": args.prompts,
    }
    return [{**facts, **side.facts, **row_of(side, measured[side.name], baselines)} for side in sides]


def _sampling(temperature: float) -> dict[str, Any]:
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def _prompts(args: argparse.Namespace, subject: Subject) -> list[Tensor]:
    """Return prefixes of texts, each of another length so that batches are padded; random ids without a tokenizer."""
    if subject.tokenizer is None:
        vocab = subject.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        return [
            torch.randint(3, vocab, (args.prompt_tokens - i % 7,), generator=generator) for i in range(args.prompts)
        ]
    prompts: list[Tensor] = []
    for text in load_texts(args):
        ids = subject.tokenizer(text, add_special_tokens=False)["input_ids"]
        # One file of the user yields all prompts; of a data set each text yields one.
        is_one = args.dataset is None and corpus_of(args) is None
        starts = range(0, len(ids), args.prompt_tokens) if is_one else range(min(1, len(ids)))
        for start in starts:
            if len(prompts) < args.prompts:
                prompts.append(torch.tensor(ids[start : start + max(1, args.prompt_tokens - len(prompts) % 7)]))
    if len(prompts) < args.prompts:
        raise BadArgumentError(f"the texts give {len(prompts)} prompts: got --prompts {args.prompts}, use fewer")
    return prompts


def _batches(prompts: Sequence[Tensor], size: int, model: Any) -> list[dict[str, Tensor]]:
    batches = []
    for first in range(0, len(prompts), size):
        ids, mask = pad_left(list(prompts[first : first + size]), 0)
        batches.append({"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)})
    # A smaller last batch would be another measurement.
    return [batch for batch in batches if len(batch["input_ids"]) == min(size, len(prompts))]


def _heads(args: argparse.Namespace) -> dict[str, Any]:
    if args.heads is not None:
        return {Path(name).name: _load(hf_kvopt.DraftHead, name) for name in args.heads}
    if args.model is not None or args.shape is not None:
        return {}
    here = MODEL_PATH.parent
    return {name: _load(hf_kvopt.DraftHead, str(here / name)) for name in _HEADS if (here / name).is_dir()}


def _assistant(args: argparse.Namespace, target: Any) -> Assistant | None:
    if args.assistant is not None:
        return Assistant(_load(AutoModelForCausalLM, args.assistant).to(target.device), args.assistant)
    if args.model is not None or args.shape is not None:
        return None
    return of_own_layers(target, _ASSISTANT_LAYERS)


def _load(loader: Any, name: str) -> Any:
    try:
        return loader.from_pretrained(name).eval()
    except (OSError, ValueError) as error:
        raise BadArgumentError(f"cannot load {name!r}: {error}") from error


def _show(subject: Subject, rows: Sequence[Mapping[str, Any]], faults: Mapping[str, str]) -> None:
    columns = ["side", "batch", "T", "tok/s", "x dynamic", "x paged", "accepted", "draft ms", "verify ms", "plain ms"]
    lines = []
    for row in rows:
        counts = [f"{row[name]:.2f}" if name in row else "-"
                  for name in ("mean_accepted_length", "draft_ms", "verify_ms", "plain_ms")]  # fmt: skip
        ratios = [f"{row[name]:.2f}" for name in ("speedup_dynamic", "speedup_paged")]
        lines.append([row["side"], row["batch"], row["temperature"], f"{row['tokens_per_s']:.0f}", *ratios, *counts])
    lines += [[name, f"DIFFERS: {fault}"] for name, fault in faults.items()]
    show_table(f"{subject.name}: speculation, medians of turns over the same prompts", columns, lines)
    verdicts = [
        [bar["metric"], row["batch"], f"{bar['value']:.2f}", bar["least"], "met" if bar["met"] else "MISSED"]
        for row in rows for bar in bars_of(row)
    ]  # fmt: skip
    if verdicts:
        show_table("bars of the shipped EAGLE-3 head, greedy", ["metric", "batch", "got", "least", "verdict"], verdicts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the eval and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
