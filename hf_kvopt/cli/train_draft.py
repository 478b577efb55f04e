"""python -m hf_kvopt train-draft: train an EAGLE or Medusa head for a frozen target.

    python -m hf_kvopt train-draft --preset cpu --model smollm2 --out DIR           text that the model writes itself
    python -m hf_kvopt train-draft --preset gpu --model NAME --data FILES --out DIR
    accelerate launch -m hf_kvopt train-draft ...                                   several GPUs
    torchrun --nproc-per-node 2 -m hf_kvopt train-draft --cpu ...                   several processes on a CPU

DIR holds the last saved head (load it with `hf_kvopt.DraftHead.from_pretrained(DIR)`), log.jsonl, features/ where they
are kept, and state/ to resume from. Ctrl-C and SIGTERM save and end; the same command resumes.
"""

import argparse
import contextlib
import io
from collections.abc import Sequence
from pathlib import Path

from hf_kvopt.cli.screen import Parser, whole_number
from hf_kvopt.plan import BadInput
from hf_kvopt.speculation.training.screen import Screen
from hf_kvopt.speculation.training.setup import PRESETS
from hf_kvopt.speculation.training.stopping import Stopping
from hf_kvopt.speculation.training.train import Trainer

_DTYPES = ("float32", "bfloat16", "float16")


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds the default to the help of every option that has one."""

    def _get_help_string(self, action: argparse.Action) -> str:
        is_told = action.default in (None, False, [], argparse.SUPPRESS) or "default" in (action.help or "")
        return (action.help or "") + ("" if is_told else " (%(default)s)")


def make_parser(preset: str | None = None) -> Parser:
    """Build the parser of the command line, with the defaults of `preset`."""
    presets = "\n".join(f"  {name}  {_as_options(values)}" for name, values in PRESETS.items())
    parser = Parser(
        "python -m hf_kvopt train-draft",
        description=__doc__,
        epilog=f"presets, which change defaults:\n{presets}",
        formatter_class=_Help,
    )
    add = parser.add_argument
    add("--preset", choices=sorted(PRESETS), help="defaults for a machine; options beside it win; see below")
    add("--model", required=True, help="the target: path or hub id, or smollm2 (from a wheel)")
    add("--out", type=Path, required=True, help="where the head is written, and resumed from")
    texts = parser.add_argument_group("texts")
    add = texts.add_argument
    add("--data", nargs="+", default=[], help="files, folders, or data sets on the hub (name or name:config)")
    add("--write", type=whole_number, metavar="TOKENS",
        help="tokens that the model writes itself, to be trained on: it goes on from pieces of --data, and converses "
        "with itself if it has a chat template; needs --keep-features (default: train on --data)")  # fmt: skip
    add("--heldout", nargs="*", default=[], help="like --data: never trained on, looked at to report (default: with "
        "--keep-features the first --eval-rows rows)")  # fmt: skip
    add("--text-column", default="text", help="column of the text")
    add("--split", default="train", help="of data sets on the hub")
    add("--row-len", type=whole_number, default=512, help="tokens a row")
    add("--keep-features", action="store_true",
        help="let the target read each row once and keep what it gives in OUT/features, 2 bytes for each number "
        "(default: read each row whenever it is trained on)")  # fmt: skip
    head = parser.add_argument_group("head")
    add = head.add_argument
    add("--head", choices=["eagle3", "eagle1", "medusa"], default="eagle3", help="kind")
    add("--steps", type=whole_number, default=5, help="tokens a draft is rolled out in training; for medusa: heads")
    add("--layers", type=int, nargs="+",
        help="hidden states of the target that EAGLE-3 reads (default: 2, n/2, n-3; with preset cpu 2, n/2, -1)",
    )  # fmt: skip
    add("--draft-vocab", type=whole_number,
        help="propose only the most frequent tokens of the text (default: all, up to 32000)")  # fmt: skip
    add("--intermediate-size", type=whole_number, help="of the head's MLP (default: the target's)")
    add("--medusa-layers", type=whole_number, default=1, help="residual blocks of each Medusa head")
    add("--shared-lm-head", action="store_true", help="read out by the target's LM head, not by an own one")
    add("--save-dtype", choices=_DTYPES, default="float32", help="of the head on disk")
    training = parser.add_argument_group("training")
    add = training.add_argument
    add("--batch-size", type=whole_number, default=8, help="rows a step and process")
    add("--accumulate", type=whole_number, default=1, help="batches a step")
    add("--max-steps", type=whole_number, default=2000, help="steps in all")
    add("--lr", type=_positive, default=1e-3, help="learning rate")
    add("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for the matrices between embeddings")
    add("--warmup", type=_share, default=0.03, help="share of the steps")
    add("--clip", type=_positive, default=1.0, help="norm of the gradient")
    add("--mixed-precision", choices=["no", "bf16", "fp16"], default="no", help="of the head in training")
    add("--dtype", choices=_DTYPES, default="float32", help="of the target")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the loss")
    add("--save-every", type=whole_number, default=200, help="steps")
    add("--eval-every", type=whole_number, default=200, help="steps")
    add("--eval-rows", type=whole_number, default=32, help="held-out rows")
    add("--eval-from", type=int, help="column of a held-out row from which decoding is simulated (default: half way)")
    add("--seed", type=int, default=0, help="of the order of the rows, and of what is drawn")
    add("--cpu", action=argparse.BooleanOptionalAction, default=False,
        help="stay on the CPU where there is something faster")  # fmt: skip
    parser.set_defaults(**PRESETS.get(preset or "", {}))
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, and return the exit status: 128 + the signal's number if one ended the run."""
    _check(args)
    with Stopping() as stopping, Screen(is_shown=True) as screen:
        try:
            trainer = Trainer(args, screen, stopping)
        except (ValueError, OSError) as error:
            raise BadInput(str(error)) from error
        screen.is_shown = trainer.accelerator.is_main_process
        try:
            trainer.run()
        except ValueError as error:
            raise BadInput(str(error)) from error
        except KeyboardInterrupt:
            if not stopping.is_asked:
                raise
            screen.say(
                f"ended at step {trainer.step} of {args.max_steps}, saved in {args.out}; the same command goes on"
            )
            return 128 + stopping.signal
    return 0


def _check(args: argparse.Namespace) -> None:
    if args.steps >= args.row_len:
        raise BadInput(f"--steps must be below --row-len: got {args.steps} and {args.row_len}; give longer rows")
    if not args.data and not args.write:
        raise BadInput("there is nothing to train on: got neither --data nor --write; give one, or --preset cpu")
    if args.write and not args.keep_features:
        raise BadInput("--write needs --keep-features: a model writes its text once; add --keep-features")


def _as_options(values: dict[str, object]) -> str:
    """Write defaults as options of the command line."""
    options = [f"--{n.replace('_', '-')}" + ("" if value is True else f" {value}") for n, value in values.items()]
    return " ".join(options)


def _positive(text: str) -> float:
    """Parse a float above 0."""
    value = _number(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be above 0: got {text!r}; for example 0.001")
    return value


def _share(text: str) -> float:
    """Parse a float from 0 to 1."""
    value = _number(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1: got {text!r}; for example 0.03")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", choices=sorted(PRESETS))
    preset = None
    with contextlib.suppress(argparse.ArgumentError, SystemExit), contextlib.redirect_stderr(io.StringIO()):
        preset = first.parse_known_args(argv)[0].preset
    return make_parser(preset).run(run, argv)
