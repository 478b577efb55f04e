"""Estimate of how long a run will take, from one row read by the target and one row that a head is trained on."""

import argparse
import time
from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from hf_kvopt.speculation.training.features import Seen, look
from hf_kvopt.speculation.training.losses import RolledOutLoss
from hf_kvopt.speculation.training.setup import make_head

_WRITING = 1.5  # writing a token costs more than reading one: attention and the choice of each token
_BATCHED = 0.8  # a row of a batch costs less than a row alone


def estimate(
    args: argparse.Namespace, target: PreTrainedModel, layers: tuple[int, ...], num_tokens: int, num_steps: int
) -> str:
    """Return a sentence on the minutes for `num_tokens` to write or read first and `num_steps` to train.

    Both are tried once; what another program takes of the machine later is not in it.
    """
    vocab_size = target.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocab_size, (1, args.row_len), device=target.device)
    read_s = _seconds(lambda: look(target, layers, ids))
    seen = look(target, layers, ids)
    head = make_head(args, target, torch.ones(vocab_size))
    torch.nn.Module.to(head, target.device)
    head.bind(target)
    loss = RolledOutLoss(head, args.steps)
    autocast = torch.autocast(
        target.device.type, torch.bfloat16, enabled=args.mixed_precision != "no" and target.device.type == "cpu"
    )

    def step() -> None:
        with torch.enable_grad(), autocast:
            loss(ids, Seen(seen.features.float(), *seen[1:])).loss.backward()

    row_s = _seconds(step) * _BATCHED
    rows = args.batch_size * args.accumulate
    train_min = num_steps * rows * (row_s if args.keep_features else row_s + read_s) / 60
    first_min = num_tokens / args.row_len * read_s * (_WRITING if args.write else 1.0) / 60
    first = (
        f"{'writing' if args.write else 'reading'} {num_tokens:,} tokens {first_min:.0f} min, " if num_tokens else ""
    )
    return (
        f"about {first_min + train_min:.0f} min: {first}training {num_steps:,} steps of {rows * args.row_len:,} tokens "
        f"{train_min:.0f} min; as this machine is now"
    )


def _seconds(call: Callable[[], object]) -> float:
    """Return the seconds of the second call."""
    call()
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
