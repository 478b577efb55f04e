"""python -m hf_kvopt train-draft: train an EAGLE or Medusa head for a frozen target.

    python -m hf_kvopt train-draft --model NAME --data FILES --out DIR
    accelerate launch -m hf_kvopt train-draft ...                                   several GPUs
    torchrun --nproc-per-node 2 -m hf_kvopt train-draft --cpu ...                   several processes on a CPU

DIR holds the last saved head (load it with `hf_kvopt.DraftHead.from_pretrained(DIR)`), log.jsonl, and state/ to resume
from: the same command resumes.
"""

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from hf_kvopt.cli.screen import Parser, whole_number
from hf_kvopt.plan import BadInput
from hf_kvopt.speculation.training.train import Trainer

_DTYPES = ("float32", "bfloat16", "float16")


def make_parser() -> Parser:
    """Build the parser of the command line."""
    parser = Parser(
        "python -m hf_kvopt train-draft", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="the target: path or hub id")
    add("--data", required=True, nargs="+", help="files, folders, or data sets on the hub (name or name:config)")
    add("--out", type=Path, required=True, help="where the head is written, and resumed from")
    add("--heldout", nargs="*", default=[], help="like --data: never trained on, looked at to report")
    add("--text-column", default="text")
    add("--split", default="train", help="of data sets on the hub")
    add("--head", choices=["eagle3", "eagle1", "medusa"], default="eagle3")
    add("--steps", type=whole_number, default=5, help="tokens a draft is rolled out in training; for medusa: heads")
    add("--layers", type=int, nargs="+", help="hidden states of the target that EAGLE-3 reads (2, n/2, n-3)")
    add("--draft-vocab", type=whole_number,
        help="propose only the most frequent tokens of the data (default: all, up to 32000)")  # fmt: skip
    add("--intermediate-size", type=whole_number, help="of the head's MLP (default: the target's)")
    add("--medusa-layers", type=whole_number, default=1, help="residual blocks of each Medusa head")
    add("--shared-lm-head", action="store_true", help="Medusa: read out by the target's LM head, not by one a head")
    add("--row-len", type=whole_number, default=512, help="tokens a row")
    add("--batch-size", type=whole_number, default=8, help="rows a step and process")
    add("--accumulate", type=whole_number, default=1, help="batches a step")
    add("--max-steps", type=whole_number, default=2000)
    add("--lr", type=_positive, default=1e-3)
    add("--optimizer", choices=["adamw", "muon"], default="adamw", help="muon: for the matrices between embeddings")
    add("--warmup", type=_share, default=0.03, help="share of the steps")
    add("--clip", type=_positive, default=1.0, help="norm of the gradient")
    add("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    add("--dtype", choices=_DTYPES, default="float32", help="of the target")
    add("--save-dtype", choices=_DTYPES, default="float32", help="of the head on disk")
    add("--compile", action="store_true", help="torch.compile the loss")
    add("--save-every", type=whole_number, default=200, help="steps")
    add("--eval-every", type=whole_number, default=200, help="steps")
    add("--eval-rows", type=whole_number, default=32)
    add("--eval-from", type=int,
        help="column of a held-out row from which decoding is simulated (default: half way)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--cpu", action="store_true", help="stay on the CPU where there is something faster")
    return parser


def run(args: argparse.Namespace) -> int:
    """Train, and return the exit status."""
    if args.steps >= args.row_len:
        raise BadInput(f"--steps must be below --row-len: got {args.steps} and {args.row_len}; give longer rows")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        trainer = Trainer(args)
    except (ValueError, OSError) as error:
        raise BadInput(str(error)) from error
    trainer.run()
    return 0


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
    return make_parser().run(run, argv)
