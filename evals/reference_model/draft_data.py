"""Training data of the bundled draft heads: library text, and the model's own greedy continuations of it.

    python -m evals.reference_model.draft_data --out DIR        # DIR/train.jsonl and DIR/heldout.jsonl

A head that drafts for greedy decoding sees text that the model wrote, so most rows are a piece of a training module
followed by the model's greedy continuation; the others are plain library text. Rows are JSON lines with `input_ids`.
No held-out module is in train.jsonl; heldout.jsonl continues pieces of held-out modules: settings were compared on it,
no weight was trained on it.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

import hf_kvopt
from evals.reference_model import corpus
from evals.reference_model.paths import heldout_texts, load

ROW_LEN = 512
# A small model soon repeats itself; short continuations of long prompts teach more.
PROMPT_LENS = (256, 320, 384, 448)
HELDOUT_PROMPT_LENS = (384,)
# Share of the pieces that begin at the start of a module.
AT_START = 0.25


def pieces(documents: list[list[int]], length: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Cut pieces of `length` tokens out of documents drawn in proportion to their size, endlessly."""
    long_enough = [ids for ids in documents if len(ids) > length]
    shares = np.array([len(ids) for ids in long_enough], dtype=float)
    while True:
        ids = long_enough[rng.choice(len(long_enough), p=shares / shares.sum())]
        start = 0 if rng.random() < AT_START else int(rng.integers(0, len(ids) - length + 1))
        yield ids[start : start + length]


@torch.inference_mode()
def continuations(model: PreTrainedModel, prompts: list[list[int]]) -> Tensor:
    """Continue equally long prompts greedily to `ROW_LEN` tokens, ignoring ends of text."""
    ids = torch.tensor(prompts, device=model.device)
    return model.generate(  # type: ignore[operator]
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_length=ROW_LEN,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )


def write_rows(
    path: Path,
    model: PreTrainedModel,
    documents: list[list[int]],
    num_generated: int,
    num_text: int,
    prompt_lens: tuple[int, ...],
    batch_size: int,
    rng: np.random.Generator,
) -> None:
    """Write `num_generated` rows with continuations and `num_text` rows of text, in random order of batches."""
    kinds = ["generated"] * -(-num_generated // batch_size) + ["text"] * -(-num_text // batch_size)
    with path.open("w", encoding="utf-8") as out:
        for number, kind in enumerate(tqdm(rng.permutation(kinds), desc=path.name, unit="batch")):
            length = ROW_LEN if kind == "text" else prompt_lens[number % len(prompt_lens)]
            source = pieces(documents, length, rng)
            rows = [next(source) for _ in range(batch_size)]
            if kind == "generated":
                rows = continuations(model, rows).tolist()
            for row in rows:
                out.write(json.dumps({"input_ids": row, "kind": kind}) + "\n")


def main(argv: list[str] | None = None) -> None:
    """Collect the library, generate, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--generated", type=int, default=4096, help="training rows with greedy continuations")
    parser.add_argument("--text", type=int, default=2048, help="training rows of library text")
    parser.add_argument("--heldout", type=int, default=64, help="rows that continue held-out modules")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load(torch.bfloat16)
    hf_kvopt.enable(model)
    rng = np.random.default_rng(args.seed)
    heldout = tokenizer(heldout_texts())["input_ids"]
    write_rows(args.out / "heldout.jsonl", model, heldout, args.heldout, 0, HELDOUT_PROMPT_LENS, args.batch_size, rng)
    files = corpus.training_files([corpus.default_source()])
    documents = tokenizer([file.text for file in files if not file.is_test])["input_ids"]
    write_rows(args.out / "train.jsonl", model, documents, args.generated, args.text, PROMPT_LENS, args.batch_size, rng)


if __name__ == "__main__":
    main()
