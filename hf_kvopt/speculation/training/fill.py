"""Filling a `FeatureStore`: the target writes rows, or reads those of the texts; goes on where it stopped."""

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_kvopt.speculation.training.data import TokenRows
from hf_kvopt.speculation.training.features import FeatureStore, Seen, look
from hf_kvopt.speculation.training.screen import Screen
from hf_kvopt.speculation.training.stopping import Stopping
from hf_kvopt.speculation.training.writer import Writer, openings, turns_of

_PART_ROWS = 96  # rows of a part: written side by side, and lost together where a run is killed
_TEXTS = 0.4  # share of the written rows that continue texts, where the model also writes conversations
_READ_ROWS = 8  # rows that the target reads at once


def made_from(args: argparse.Namespace, layers: tuple[int, ...]) -> dict[str, Any]:
    """Return what the rows of a run depend on, to tell whether rows on disk may be used."""
    texts = {"data": [str(Path(name).resolve()) if Path(name).exists() else name for name in args.data]}
    source = str(Path(args.model).resolve()) if Path(args.model).exists() else args.model
    made = {"model": source, "dtype": args.dtype, "layers": list(layers), "row_len": args.row_len, "seed": args.seed}
    return {**made, **texts, "text_column": args.text_column, "split": args.split, "written": bool(args.write)}


def num_rows_of(args: argparse.Namespace) -> int:
    """Return how many rows `--write` or `--rows` asks for."""
    return max(1, -(-args.write // args.row_len)) if args.write else args.max_steps * args.batch_size * args.accumulate


def fill(
    store: FeatureStore,
    args: argparse.Namespace,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layers: tuple[int, ...],
    texts: TokenRows | None,
    screen: Screen,
    stopping: Stopping,
) -> None:
    """Add parts to `store` until it holds the rows that `args` ask for.

    Raises:
        KeyboardInterrupt: the user asked to end; finished parts stay.
        ValueError: there is nothing to write from.
    """
    wanted = num_rows_of(args)
    screen.begin("writing text" if args.write else "reading text", wanted * args.row_len, store.num_rows * args.row_len)
    while store.num_rows < wanted:
        count = min(_PART_ROWS, wanted - store.num_rows)
        if args.write:
            _write(store, args, target, tokenizer, layers, texts, count, screen, stopping)
        elif not _read(store, target, layers, texts, count, screen, stopping):
            break


def _write(
    store: FeatureStore, args: argparse.Namespace, target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase,
    layers: tuple[int, ...], texts: TokenRows | None, count: int, screen: Screen, stopping: Stopping,
) -> None:  # fmt: skip
    turns, done, seed = turns_of(tokenizer), store.num_rows, args.seed + len(store.parts)
    if turns is None and texts is None:
        raise ValueError("--write needs a chat template or texts to continue: got neither; give --data")
    num_texts = 0 if texts is None else count if turns is None else round(_TEXTS * count)
    ends = target.generation_config.eos_token_id if target.generation_config is not None else None
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    begun = openings(texts, num_texts, seed) if texts is not None and num_texts else []
    for made in Writer(target, layers, args.row_len, turns, ends).write(begun, count - num_texts, seed):
        if stopping.is_asked:
            raise KeyboardInterrupt
        if isinstance(made, int):
            screen.show(done * args.row_len + count * min(made, args.row_len), 1)
        else:
            # Texts and conversations are mixed, so that the first rows of a part are a sample of it.
            order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
            store.add(made[0][order], Seen(*(x[order] for x in made[1])))


def _read(
    store: FeatureStore, target: PreTrainedModel, layers: tuple[int, ...], texts: TokenRows | None, count: int,
    screen: Screen, stopping: Stopping,
) -> bool:  # fmt: skip
    """Add a part of up to `count` rows of text; return whether there was one more row."""
    assert texts is not None  # the command line asks for --data
    done = store.num_rows
    rows = list(islice(texts, done, done + count))
    seen: list[Seen] = []
    for part in torch.stack(rows).split(_READ_ROWS) if rows else ():
        if stopping.is_asked:
            raise KeyboardInterrupt
        seen.append(Seen(*(x.cpu() for x in look(target, layers, part.to(target.device)))))
        screen.show((done + _READ_ROWS * len(seen)) * texts.row_len, 1)
    if rows:
        store.add(torch.stack(rows), Seen(*(torch.cat(parts) for parts in zip(*seen, strict=True))))
    return bool(rows)
