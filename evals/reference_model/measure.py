"""Bits per byte on the held-out modules: `python -m evals.reference_model.measure [--model PATH]`.

bits per byte = Σ −log2 p(token | the tokens before it in its file) / UTF-8 bytes of the files.

Each file begins with the beginning-of-sequence token, whose own probability is not counted; neither is the end token's.
A file longer than `--context` is read in windows that advance by half of it, each token scored once, with at least half
a window before it. `--positions` also scores the files as one ring, read from starting points that are one bucket of
positions apart: every bucket then holds the same text once.
"""

import argparse
import itertools
import json
import math
import os
import platform
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from evals.reference_model.paths import MODEL_PATH, heldout_texts

BUCKETS = ((0, 1024), (1024, 2048), (2048, 4096), (4096, 8192))


class Encoded(NamedTuple):
    """One file: ids with the start token in front, and the UTF-8 bytes of each id (0 for the start token)."""

    ids: Tensor  # [num_tokens] int64
    num_bytes: Tensor  # [num_tokens] int64


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Encoded:
    """Encode one file; a character split over tokens counts with the last of them."""
    batch = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = [0, *(start for start, _ in batch["offset_mapping"][1:]), len(text)]
    lengths = [len(text[a:b].encode()) for a, b in itertools.pairwise(starts)]
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return Encoded(torch.tensor([first, *batch["input_ids"]]), torch.tensor([0, *lengths]))


@torch.inference_mode()
def token_bits(
    model: PreTrainedModel,
    ids: Tensor,  # [num_tokens]
) -> Tensor:
    """Return −log2 p of ids 1… given those before them, float64 `[num_tokens - 1]`."""
    logits = model(ids[None].to(model.device), use_cache=False).logits[0, :-1].float()
    nats = F.cross_entropy(logits, ids[1:].to(model.device), reduction="none")
    return nats.double().cpu() / math.log(2)


def windows(num_tokens: int, context: int) -> Iterator[tuple[int, int, int]]:
    """Yield (start, stop, first token to score), with each token but the first scored once."""
    scored = 1
    start = 0
    while scored < num_tokens:
        stop = min(start + context, num_tokens)
        yield start, stop, scored
        scored, start = stop, start + context // 2


def file_bits(model: PreTrainedModel, file: Encoded, context: int) -> float:
    """Return the bits of one file."""
    total = 0.0
    for start, stop, scored in windows(len(file.ids), context):
        total += token_bits(model, file.ids[start:stop])[scored - start - 1 :].sum().item()
    return total


def bits_by_position(model: PreTrainedModel, files: list[Encoded], eos: int | None) -> dict[str, float]:
    """Return bits per byte in each bucket of positions, over the same text in every bucket."""
    if eos is not None:
        end = Encoded(torch.tensor([eos]), torch.tensor([0]))
        files = [part for file in files for part in (file, end)]
    ids = torch.cat([file.ids for file in files])
    num_bytes = torch.cat([file.num_bytes for file in files])
    by_position = {}
    for first, stop in tqdm(BUCKETS, desc="positions"):
        bits = sizes = 0.0
        # Steps as wide as the bucket: it passes over the whole ring once.
        for start in range(0, len(ids), stop - first):
            ring = (torch.arange(stop + 1) + start) % len(ids)
            in_bucket = num_bytes[ring[first + 1 :]]
            bits += (token_bits(model, ids[ring])[first:] * (in_bucket > 0)).sum().item()
            sizes += in_bucket.sum().item()
        by_position[f"{first}-{stop}"] = bits / sizes
    return by_position


def revision() -> str:
    """Return the git revision, or `unknown` outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Score the held-out files and return the row."""
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    model.eval().to(torch.device(args.device))
    files = [encode(tokenizer, text) for text in heldout_texts()]
    total_bytes = sum(int(f.num_bytes.sum()) for f in files)
    bits = sum(file_bits(model, f, args.context) for f in tqdm(files, desc="files", mininterval=2))
    row: dict[str, object] = {
        "eval": "reference_model",
        "model": args.model,
        "bits_per_byte": round(bits / total_bytes, 4),
        "context": args.context,
        "files": len(files),
        "bytes": total_bytes,
        "tokens": sum(len(f.ids) - 1 for f in files),
    }
    if args.positions:
        by_position = bits_by_position(model, files, tokenizer.eos_token_id)
        row["by_position"] = {name: round(value, 4) for name, value in by_position.items()}
    return row | {
        "dtype": args.dtype,
        "device": args.device,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "revision": revision(),
    }


def show(row: dict[str, object]) -> None:
    """Print the table, then the row as one JSON line."""
    table = Table(title="Held-out bits per byte")
    table.add_column("what")
    table.add_column("bits per byte", justify="right")
    table.add_row(f"whole files, context {row['context']}", f"{row['bits_per_byte']:.4f}")
    by_position = row.get("by_position", {})
    assert isinstance(by_position, dict)
    for name, value in by_position.items():
        table.add_row(f"same text at positions {name}", f"{value:.4f}")
    Console(stderr=True).print(table)
    print(json.dumps(row))


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default=os.path.relpath(MODEL_PATH), help="folder, or a hub id")
    parser.add_argument("--context", type=int, default=2048, help="longest window, in tokens")
    parser.add_argument("--positions", action="store_true", help="also by position, up to 8,192")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    show(measure(parser.parse_args(argv)))


if __name__ == "__main__":
    main()
