"""Rows of tokens to train a draft head on, streamed from text files, data files or data sets."""

from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets import IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase

_READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_SHUFFLE_BUFFER = 1024


class TokenRows(torch.utils.data.IterableDataset[Any]):
    """Documents one after another, cut into rows of `row_len` tokens; the epoch determines the order.

    Args:
        sources: files (.json, .jsonl, .parquet, .csv; any other is read as one text document), folders of such files,
            or `name`, `name:config` of a data set on the hub. A record has `input_ids` (used unchanged), `messages`
            (through the chat template) or text.
        tokenizer: the target's tokenizer.
        row_len: tokens of each row.
        text_column: the column that holds the text.
        split: the split of data sets on the hub.
        seed: seed of the shuffling; None keeps the order.

    Raises:
        ValueError: the sources hold nothing to read, or a record has no known column.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: PreTrainedTokenizerBase,
        row_len: int,
        *,
        text_column: str = "text",
        split: str = "train",
        seed: int | None = 0,
    ) -> None:
        self._parts = [part for source in sources for part in open_source(source, split)]
        if not self._parts:
            raise ValueError(f"data must name files, folders or data sets: got {list(sources)}, which hold no file")
        self._tokenizer, self.row_len, self._text_column = tokenizer, row_len, text_column
        self._seed, self._epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the shuffling of the next pass."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        kept: list[int] = []
        for document in self.documents():
            kept += document
            while len(kept) >= self.row_len:
                yield torch.tensor(kept[: self.row_len])
                del kept[: self.row_len]

    def documents(self) -> Iterator[list[int]]:
        """Yield the tokens of each document, in the order of this epoch."""
        parts = self._parts
        if self._seed is not None:
            seed = self._seed + self._epoch
            parts = [part.shuffle(seed=seed, buffer_size=_SHUFFLE_BUFFER) for part in parts]
        return map(self._encode, chain.from_iterable(parts))

    def _encode(self, record: dict[str, Any]) -> list[int]:
        if record.get("input_ids") is not None:
            return list(record["input_ids"])
        if record.get("messages") is not None:
            text = self._tokenizer.apply_chat_template(record["messages"], tokenize=False)
            return self._tokenizer(text, add_special_tokens=False)["input_ids"]
        if record.get(self._text_column) is None:
            raise ValueError(
                f"a record needs a column input_ids, messages or {self._text_column!r}: got {sorted(record)}; name the "
                "text with --text-column"
            )
        end = self._tokenizer.eos_token_id
        return self._tokenizer(record[self._text_column])["input_ids"] + ([end] if end is not None else [])


def open_source(source: str, split: str = "train") -> list[IterableDataset]:
    """Return one stream for each kind of file in `source`, or one for a data set on the hub.

    Raises:
        ValueError: a path that does not exist and cannot name a data set.
    """
    path = Path(source)
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
    elif path.is_file():
        files = [path]
    elif source.startswith((".", "/", "~")) or path.suffix in (*_READERS, ".txt"):
        raise ValueError(f"data {source!r} is not there: expected a file, a folder, or the name of a data set")
    else:
        name, _, config = source.partition(":")
        return [datasets.load_dataset(name, config or None, split=split, streaming=True)]
    by_reader: dict[str, list[str]] = {}
    for file in files:
        by_reader.setdefault(_READERS.get(file.suffix, "text"), []).append(str(file))
    return [
        datasets.load_dataset(
            reader,
            data_files=names,
            split="train",
            streaming=True,
            **({"sample_by": "document"} if reader == "text" else {}),
        )
        for reader, names in by_reader.items()
    ]


def count_tokens(rows: TokenRows, num_rows: int, vocab_size: int) -> Tensor:
    """Count each token in the first `num_rows` rows: [vocab_size] int64."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for _, row in zip(range(num_rows), rows, strict=False):
        counts += torch.bincount(row, minlength=vocab_size)
    return counts
