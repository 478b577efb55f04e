"""Token windows to prompt with: a bundled or packaged text, a data set by name, or random ids."""

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch
from datasets import load_dataset
from torch import Tensor

from evals._common.cli import BadArgumentError
from evals._common.corpora import CORPORA, PARTS
from evals._common.models import Subject

# The name that papers use; the hub has moved it.
ALIASES = {"wikitext-2": "Salesforce/wikitext:wikitext-2-raw-v1"}


def add_text_arguments(parser: argparse.ArgumentParser, part: str = "all") -> None:
    """Add `--text` and `--part`, and `--dataset`, `--split` and `--column` instead of them."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--text", help=f"{', '.join(CORPORA)}, or a text file of yours (programs)")
    which.add_argument("--dataset", help="wikitext-2, or NAME or NAME:CONFIG for datasets.load_dataset, instead")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default=part,
        help="settings are chosen on one part of programs and prose, judged on another (%(default)s)",
    )
    parser.add_argument("--split", default="test", help="split of --dataset (%(default)s)")
    parser.add_argument("--column", default="text", help="text column of --dataset (%(default)s)")


def load_texts(args: argparse.Namespace) -> Iterable[str]:
    """Return the texts that the arguments of `add_text_arguments` chose.

    Raises:
        BadArgumentError: the file, the data set, its split or its column does not exist, or the file is no text.
    """
    corpus = corpus_of(args)
    if corpus is not None:
        return CORPORA[corpus](args.part)
    if args.text is not None:
        return [_read(Path(args.text))]
    name, _, config = ALIASES.get(args.dataset, args.dataset).partition(":")
    try:
        rows = load_dataset(name, config or None, split=args.split)
    except (OSError, ValueError) as error:
        raise BadArgumentError(f"cannot load data set {args.dataset!r}, split {args.split!r}: {error}") from error
    if args.column not in rows.column_names:
        raise BadArgumentError(f"no column {args.column!r} in {args.dataset!r}: it has {', '.join(rows.column_names)}")
    return (row[args.column] for row in rows)


def corpus_of(args: argparse.Namespace) -> str | None:
    """Name the text of the evals that was chosen; None for a file or a data set."""
    name = args.text or "programs"
    return name if args.dataset is None and name in CORPORA else None


def text_name(args: argparse.Namespace) -> str | None:
    """Name the file or data set that was chosen; None for a text of the evals."""
    return None if corpus_of(args) is not None else args.text or args.dataset


def text_facts(args: argparse.Namespace) -> dict[str, str | None]:
    """Name the text of a run, for its rows."""
    corpus = corpus_of(args)
    return {"dataset": text_name(args), "corpus": corpus, "part": None if corpus is None else args.part}


def _read(path: Path) -> str:
    try:
        text = path.expanduser().read_text(encoding="utf8")
    except (OSError, ValueError) as error:
        raise BadArgumentError(f"cannot read --text {str(path)!r}: {error}; expected a text file in UTF-8") from error
    if not text.strip():
        raise BadArgumentError(f"--text {str(path)!r} holds no text: expected a text file in UTF-8")
    return text


def token_stream(
    subject: Subject,
    texts: Iterable[str],
    num_tokens: int,
    seed: int = 0,
) -> Tensor:  # [num_tokens] int64, on the CPU
    """Encode texts one after another, repeating them if they are too short; random ids without a tokenizer."""
    if subject.tokenizer is None:
        vocab_size = subject.model.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, vocab_size, (num_tokens,), generator=generator)
    ids: list[int] = []
    for text in texts:
        if len(ids) >= num_tokens:
            break
        if text.strip():
            ids += subject.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise BadArgumentError("the texts hold no token")
    return torch.tensor(ids).repeat(-(-num_tokens // len(ids)))[:num_tokens]


def pad_left(
    prompts: list[Tensor],  # each [prompt_len] int64
    pad_token_id: int,
) -> tuple[Tensor, Tensor]:  # ids and mask, both [batch, longest prompt_len]
    """Stack prompts of different lengths with padding on the left."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), longest), pad_token_id)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return ids, mask
