"""`python -m hf_kvopt calibrate MODEL`: what each storage format loses on this model; `enable` goes by it later."""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_kvopt.calibration import Calibration, calibrate, choose
from hf_kvopt.calibration.choose import DEFAULT_MAX_LOSS
from hf_kvopt.calibration.text import ROWS, TOKENS, text_ids
from hf_kvopt.cli.screen import Parser, as_json, table, whole_number
from hf_kvopt.plan import BadInput
from hf_kvopt.quant import KV_FORMATS

_DTYPES = ("float32", "bfloat16", "float16")
_COLUMNS = ("format", "of bfloat16", "loss, %", "+-", "KL, nats", "top-1", "within")
_EXAMPLES = """examples:
  python -m hf_kvopt calibrate smollm2
  python -m hf_kvopt calibrate ./model --layers int4 --max-loss 1 --text notes.txt"""


def make_parser() -> Parser:
    """Describe the command line."""
    about = 'Measure what each cache format loses on a model; enable(model, cache="auto") chooses by it.'
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m hf_kvopt calibrate", description=about, epilog=_EXAMPLES, formatter_class=form)
    parser.add_argument("model", metavar="MODEL", help="hub id, folder, or smollm2 (from a wheel)")
    formats = [name for name, fmt in KV_FORMATS.items() if not fmt.is_native]
    parser.add_argument("--formats", nargs="+", choices=formats, default=formats, help="which to measure (all)")
    parser.add_argument(
        "--layers", nargs="+", choices=formats, default=[], metavar="FORMAT", help="also measure each layer alone"
    )
    parser.add_argument("--max-loss", type=float, default=DEFAULT_MAX_LOSS, help="per cent allowed (%(default)s)")
    parser.add_argument("--text", type=Path, help="a text file to read (Python's manual)")
    parser.add_argument("--rows", type=whole_number, default=ROWS, help="pieces of the text (%(default)s)")
    parser.add_argument("--tokens", type=whole_number, default=TOKENS, help="of each, 256 or more (%(default)s)")
    parser.add_argument("--dtype", choices=_DTYPES, help="(the checkpoint's)")
    parser.add_argument("--device", help="such as cpu or cuda (cuda when there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, keep and print."""
    model = _load(args)
    ids = text_ids(model, _text(args.text), args.rows, args.tokens)
    try:
        found = calibrate(model, ids, formats=args.formats, layers_of=args.layers)
        chosen = choose(model, args.max_loss)
    except ValueError as error:
        raise BadInput(str(error)) from error
    print(as_json(asdict(found)) if args.json else _shown(args, found, chosen.said))
    return 0


def _load(args: argparse.Namespace) -> PreTrainedModel:
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        loaded: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, dtype=args.dtype or "auto")
        return torch.nn.Module.to(loaded, device).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"cannot load {args.model!r} on {device}: {str(error).strip().splitlines()[0]}") from error


def _text(path: Path | None) -> str | None:
    try:
        return None if path is None else path.read_text(encoding="utf8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"--text must be a readable text file: got {str(path)!r}, {error}") from error


def _shown(args: argparse.Namespace, found: Calibration, said: str) -> str:
    parts = [f"{found.model}: {found.num_tokens:,} next-token distributions compared with the unquantized cache's"]
    rows = [
        (
            name,
            f"{loss.bf16_share:.2f}",
            f"{loss.percent:.3f}",
            f"{loss.most_percent - loss.percent:.3f}",
            f"{loss.kl:.1e}",
            f"{loss.top1:.1%}",
            "yes" if loss.most_percent <= args.max_loss else "no",
        )
        for name, loss in sorted(found.losses.items(), key=lambda item: -item[1].bf16_share)
    ]
    parts.append(table(rows, _COLUMNS) if rows else "no format can be measured here")
    parts += [f"{name} is left out: {why}" for name, why in found.skipped.items()]
    for name, layers in found.layers.items():
        ranked = sorted(layers, key=lambda i: -layers[i])
        most = ", ".join(f"{i} ({layers[i]:.1e})" for i in ranked[:8])
        parts.append(f"{name}, most sensitive layers first, KL of each alone: {most}")
    return "\n\n".join([*parts, said])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return make_parser().run(run, argv)


if __name__ == "__main__":
    sys.exit(main())
