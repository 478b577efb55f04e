"""Peak memory of one side's prefill and decode; on a CPU in a fresh process, by its resident growth."""

import argparse
import subprocess
import sys

import torch

from evals._common.cli import BadArgumentError, Parser, at_least
from evals._common.memory import peak_bytes
from evals._common.models import Subject, add_model_arguments, load_subject, model_arguments
from evals._common.sides import Side, parse_side
from evals.speed.workload import Workload, decode, prefill


def peak_of(args: argparse.Namespace, subject: Subject, side: Side, work: Workload) -> int:
    """Return the peak bytes held beyond the model's weights: torch's own count, or resident growth."""
    if subject.model.device.type != "cpu":
        return _peak_here(subject, side, work)
    sizes = {"context": work.context, "batch": work.batch, "steps": work.steps}
    options = [f"--{name}={size}" for name, size in sizes.items()]
    command = [sys.executable, "-m", "evals.speed.peak", *model_arguments(args), f"--side={side}", *options]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode:
        raise BadArgumentError(f"cannot measure the memory of {side}: {child.stderr.strip()[-400:]}")
    return int(child.stdout.split()[-1])


def _peak_here(subject: Subject, side: Side, work: Workload) -> int:
    """Measure in this process, after a short run that loads everything that is loaded once."""
    warm_up = Workload(context=8, batch=work.batch, steps=2, new_tokens=0)
    _run(subject, side, warm_up)
    return peak_bytes(subject.model.device, lambda: _run(subject, side, work))


def _run(subject: Subject, side: Side, work: Workload) -> None:
    model, cache = side.attend(subject.model), work.make_cache(side, subject)
    # Token values do not affect the memory.
    ids = torch.ones(work.batch, work.max_len, dtype=torch.int64, device=model.device)
    prefill(model, cache, ids[:, : work.context])
    decode(model, cache, ids[:, work.context :])


def run(args: argparse.Namespace) -> int:
    """Print the peak in bytes."""
    work = Workload(context=args.context, batch=args.batch, steps=args.steps, new_tokens=0)
    print(_peak_here(load_subject(args), parse_side(args.side), work))
    return 0


if __name__ == "__main__":
    parser = Parser("evals.speed.peak", description=__doc__)
    add_model_arguments(parser)
    parser.add_argument("--side", required=True)
    for size in ("--context", "--batch", "--steps"):
        parser.add_argument(size, type=at_least(1), required=True)
    sys.exit(parser.run(run))
