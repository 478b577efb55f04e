"""Features that a head is trained on: rows of tokens, hidden states of the target, and its most likely next tokens.

`look` makes it from rows of text. `FeatureStore` keeps it in files, so that the target runs once over each row however
often the head is trained on it.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

NUM_TOP = 32  # next tokens that are kept of each position: the rest holds 1 to 3 % of a small model's probability
_MANIFEST = "features.json"


class Seen(NamedTuple):
    """Outputs of the target for a batch of rows."""

    features: Tensor  # [batch, row_len, num_features * hidden_size]
    top_ids: Tensor  # [batch, row_len, num_top] int64: the most likely next tokens, the first one first
    top_p: Tensor  # [batch, row_len, num_top] float: their probabilities

    @property
    def best(self) -> Tensor:
        """Return the target's first choice after each position: [batch, row_len] int64."""
        return self.top_ids[..., 0]


def most_likely(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Return ids and probabilities [..., num_top] of the most likely tokens of logits [..., vocab_size]."""
    top = logits.topk(min(NUM_TOP, logits.shape[-1]), dim=-1)
    return top.indices, (top.values.float() - logits.float().logsumexp(-1, keepdim=True)).exp()


@torch.no_grad()
def look(target: PreTrainedModel, layers: tuple[int, ...], input_ids: Tensor) -> Seen:
    """Run the target on rows [batch, row_len] and return what a head that reads `layers` is trained on."""
    out = target(input_ids=input_ids, use_cache=False, output_hidden_states=True)
    return Seen(torch.cat([out.hidden_states[layer] for layer in layers], dim=-1), *most_likely(out.logits))


class FeatureStore(torch.utils.data.IterableDataset[Any]):
    """Rows on disk, in parts that are written whole; a part that was not finished is made again.

    Args:
        folder: where the parts lie; made if needed.
        made_from: what the rows depend on (model, layers, texts, ...), as JSON values.
        num_heldout: rows at the beginning that `__iter__` leaves out, and `heldout` returns.
        seed: seed of the shuffling.

    Raises:
        ValueError: the folder holds rows that were made from something else.
    """

    def __init__(self, folder: Path, made_from: dict[str, Any], num_heldout: int = 0, seed: int = 0) -> None:
        self.folder, self._num_heldout, self._seed, self._epoch = folder, num_heldout, seed, 0
        folder.mkdir(parents=True, exist_ok=True)
        manifest = folder / _MANIFEST
        kept = json.loads(manifest.read_text()) if manifest.exists() else made_from
        differing = sorted(name for name in {*kept, *made_from} if kept.get(name) != made_from.get(name))
        if differing:
            told = ", ".join(f"{name} {kept.get(name)!r}" for name in differing)
            asked = ", ".join(f"{name} {made_from.get(name)!r}" for name in differing)
            raise ValueError(
                f"the features in {folder} were made from {told}: got {asked}; give another --out, or remove the folder"
            )
        manifest.write_text(json.dumps(made_from, indent=2))

    @property
    def parts(self) -> list[Path]:
        """Return the files of the parts, in the order in which they were added."""
        return sorted(self.folder.glob("part-*.safetensors"))

    @property
    def num_rows(self) -> int:
        """Return the number of rows in all parts."""
        return sum(_num_rows(path) for path in self.parts)

    def add(self, input_ids: Tensor, seen: Seen) -> None:
        """Write one more part with rows [rows, row_len]; features are kept in bfloat16."""
        path = self.folder / f"part-{len(self.parts):05d}.safetensors"
        new = path.with_suffix(".new")
        tensors = {
            "input_ids": input_ids.int(),
            "features": seen.features.to(torch.bfloat16),
            "top_ids": seen.top_ids.int(),
            "top_p": seen.top_p.to(torch.float16),
        }
        save_file({name: x.cpu().contiguous() for name, x in tensors.items()}, new)
        new.rename(path)

    def set_epoch(self, epoch: int) -> None:
        """Select the shuffling of the next pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Yield (tokens, features, top ids, top probabilities) of every row but the held-out ones, shuffled."""
        order = torch.Generator().manual_seed(self._seed + self._epoch)
        parts, firsts, left = self.parts, [], self._num_heldout
        for path in parts:
            firsts.append(min(left, _num_rows(path)))
            left -= firsts[-1]
        for number in torch.randperm(len(parts), generator=order).tolist():
            rows, first = _load(parts[number]), firsts[number]
            for row in (first + torch.randperm(len(rows[0]) - first, generator=order)).tolist():
                yield rows[0][row], rows[1][row], rows[2][row], rows[3][row]

    def heldout(self) -> tuple[Tensor, Seen] | None:
        """Return the rows that training never sees, or None if there are none."""
        kept: list[tuple[Tensor, ...]] = []
        for path in self.parts:
            missing = self._num_heldout - sum(len(rows[0]) for rows in kept)
            if missing <= 0:
                break
            kept.append(tuple(x[:missing] for x in _load(path)))
        if not kept:
            return None
        rows = [torch.cat(parts) for parts in zip(*kept, strict=True)]
        return rows[0], Seen(rows[1], rows[2], rows[3])

    def count_tokens(self, vocab_size: int) -> Tensor:
        """Count the target's first choices in all rows: [vocab_size] int64."""
        counts = torch.zeros(vocab_size, dtype=torch.long)
        for path in self.parts:
            counts += torch.bincount(_load(path)[2][..., 0].flatten(), minlength=vocab_size)
        return counts


def _num_rows(path: Path) -> int:
    with safe_open(path, "pt") as part:
        return int(part.get_slice("input_ids").get_shape()[0])


def _load(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return tokens, features, top ids and top probabilities of a part."""
    kept = load_file(path)
    return kept["input_ids"].long(), kept["features"], kept["top_ids"].long(), kept["top_p"].float()
