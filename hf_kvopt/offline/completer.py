"""Completer: rows with prompts in, rows with completions out; for files, `datasets` and Ray Data alike.

rows ──► prompts ──► jobs of one running batch ──► completions, as they end
             └── a prompt that cannot be used ──► its row gets an "error", the others go on
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_kvopt.batching.job import Job
from hf_kvopt.batching.many import run_jobs
from hf_kvopt.batching.request import Request
from hf_kvopt.batching.rules import rules_for
from hf_kvopt.batching.settings import BatchConfig, Runtime, split_settings
from hf_kvopt.offline.prompts import encode, prompt_columns

ADDED = ("completion", "num_tokens", "finish_reason", "error")
"""Columns that are added to each row."""


class Completer:
    """Generates for rows, as many at a time as memory and `max_rows` allow.

    A call takes and returns columns, which is what `datasets.Dataset.map(completer, batched=True)` and Ray Data's
    `map_batches(Completer, fn_constructor_args=[name])` ask for.

    Args:
        model: a decoder in evaluation mode, or the hub id or folder of one, which is loaded in its own dtype onto the
            first CUDA device, else the CPU.
        tokenizer: of the model; None loads the one beside a named model, and takes prompts of token ids alone beside
            a loaded one.
        column: the column of the prompts: texts, chats or token ids. None looks for "messages", "prompt", "text" and
            "input_ids", in this order.
        cache: see `Batcher`.
        seed: of the first sample of the first row; every further sample counts on from there, so that a row's tokens
            depend on its number and not on what it is computed with.
        num_return_sequences: samples of each row; with more than one, "completion" and the others are lists.
        settings: those of `Batcher` (`max_tokens`, `max_rows`, `draft`, ...) and of `generate()`.

    Columns that are added: "completion" (the text behind the prompt without special tokens; token ids where there is
    no tokenizer), "num_tokens" (new ones, an end-of-text token included), "finish_reason" ("stop", "length", "time"),
    and "error" (why this row has no completion, its other columns being empty; "" for rows that have one).

    Raises:
        ValueError, TypeError: see `Batcher`.

    Examples:
        >>> with Completer(model, column="input_ids", max_new_tokens=4, do_sample=False) as completer:
        ...     rows = completer({"input_ids": [[1, 2, 3], [4, 5]]})
        >>> rows["num_tokens"]
        [4, 4]
    """

    def __init__(
        self,
        model: PreTrainedModel | str,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        column: str | None = None,
        cache: str = "paged",
        seed: int = 0,
        num_return_sequences: int = 1,
        **settings: Any,
    ) -> None:
        if not isinstance(num_return_sequences, int) or num_return_sequences < 1:
            raise ValueError(f"num_return_sequences must be an integer of at least 1: got {num_return_sequences!r}")
        if isinstance(model, str):
            model, tokenizer = _loaded(model, tokenizer)
        own, settings = split_settings(settings)
        self.tokenizer, self.column = tokenizer, column
        self.num_samples, self._seed, self._settings = num_return_sequences, seed, settings
        if tokenizer is not None and settings.get("stop_strings"):
            self._settings["tokenizer"] = tokenizer
        self._num_called = 0
        self._runtime = Runtime(model, BatchConfig(cache=cache, **own))
        try:
            rules_for(
                self._runtime.model, [0], seed=seed, **self._settings
            )  # a setting that no row could take is refused here
        except BaseException:
            self.close()
            raise

    def __call__(self, columns: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Complete the rows of a batch.

        Args:
            columns: equally many values of each column.

        Returns:
            The same columns, and those that are added, in the order of the rows.

        Raises:
            ValueError: there is no column of prompts, or one that would be overwritten.
        """
        names = prompt_columns(list(columns), self.column)
        require_free(list(columns))
        values = zip(*(columns[name] for name in names), strict=True)
        prompts = [next((value for value in row if value is not None), None) for row in values]
        first, self._num_called = self._num_called, self._num_called + len(prompts)
        found = dict(self.complete(enumerate(prompts, first)))
        added = {name: [found[first + i][name] for i in range(len(prompts))] for name in ADDED}
        return {**columns, **added}

    def complete(self, prompts: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Complete numbered prompts, and yield each number with its columns as soon as all its samples ended.

        Args:
            prompts: row numbers, which seeds depend on, and texts, chats or token ids; taken as room comes up.

        Raises:
            Exception: what the model raises; the completer is to be closed then.
        """
        refused: list[tuple[int, dict[str, Any]]] = []
        samples: dict[int, list[Request]] = {}
        numbers: dict[Request, int] = {}
        for request in run_jobs(self._runtime, self._jobs(prompts, refused, samples, numbers)):
            yield from refused
            refused.clear()
            number = numbers.pop(request)
            if number in samples and all(sample.is_done for sample in samples[number]):
                yield number, self._columns(samples.pop(number))
        yield from refused

    def close(self) -> None:
        """Give all memory back, and let the model be as it was."""
        self._runtime.close("cancelled")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _jobs(
        self,
        prompts: Iterable[tuple[int, Any]],
        refused: list[tuple[int, dict[str, Any]]],
        samples: dict[int, list[Request]],
        numbers: dict[Request, int],
    ) -> Iterator[Job]:
        """Make a job for each sample of each prompt; a prompt that cannot be used goes to `refused`."""
        for number, value in prompts:
            try:
                jobs = self._jobs_of(number, value)
            except (ValueError, TypeError) as error:
                refused.append((number, self._failed(str(error))))
                continue
            samples[number] = [job.request for job in jobs]
            numbers.update((job.request, number) for job in jobs)
            yield from jobs

    def _jobs_of(self, number: int, value: Any) -> list[Job]:
        runtime, jobs = self._runtime, []
        prompt = runtime.prompt(encode(self.tokenizer, value))
        for sample in range(self.num_samples):
            seed = self._seed + number * self.num_samples + sample
            rules = runtime.rules(prompt, seed=seed, **self._settings)
            jobs.append(runtime.engine.job(Request(prompt), rules))
        return jobs

    def _columns(self, requests: Sequence[Request]) -> dict[str, Any]:
        error = next((request.error for request in requests if request.error is not None), None)
        if error is not None:
            return self._failed(f"{type(error).__name__}: {error}")
        texts = [self._text(request.tokens) for request in requests]
        counts, reasons = [len(request.tokens) for request in requests], [request.finish_reason for request in requests]
        values = (texts, counts, reasons) if self.num_samples > 1 else (texts[0], counts[0], reasons[0])
        return dict(zip(ADDED, (*values, ""), strict=True))

    def _failed(self, why: str) -> dict[str, Any]:
        values = ([], [], []) if self.num_samples > 1 else ("" if self.tokenizer is not None else [], 0, "")
        return dict(zip(ADDED, (*values, why), strict=True))

    def _text(self, tokens: list[int]) -> Any:
        return tokens if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)


def require_free(names: Sequence[str], added: Sequence[str] = ADDED) -> None:
    """Raise ValueError where rows have a column already that would be added to them."""
    taken = sorted(set(names) & set(added))
    if taken:
        raise ValueError(f"rows get the columns {list(added)}: got rows that have {taken} already; rename those")


def _loaded(
    name: str, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype="auto")
    return torch.nn.Module.to(model, device).eval(), tokenizer or AutoTokenizer.from_pretrained(name)
