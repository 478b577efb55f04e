"""python -m hf_kvopt batch: completions for a file of prompts, by continuous batching, over any number of processes.

input ─► rows ─┬─► process 0: rows 0, 2, 4 ... ─┬─► part files ─► output, in order
               └─► process 1: rows 1, 3, 5 ... ─┘
"""

import argparse
import hashlib
import importlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.distributed import DistributedConfig

from hf_kvopt.cli.screen import BATCHING, Parser, add_batching, whole_number
from hf_kvopt.offline.completer import ADDED, Completer, require_free
from hf_kvopt.offline.parts import INDEX, Parts
from hf_kvopt.offline.prompts import prompt_columns
from hf_kvopt.plan import BadInput

_LOADERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
_EXAMPLES = """examples:
  python -m hf_kvopt batch --model smollm2 --input prompts.jsonl --output out.jsonl --max-new-tokens 64
  torchrun --nproc-per-node 8 -m hf_kvopt.batch --model ./model --input prompts.jsonl --output out.jsonl --cache int8
  torchrun --nproc-per-node 2 -m hf_kvopt.batch --tp-size 2 --shard 0/4 --model ./model --input p.jsonl --output o.jsonl

A line of the input holds a text under "prompt" or "text", a chat under "messages", or token ids under "input_ids".
A run that was stopped goes on when the same command is given again."""


def make_parser() -> Parser:
    """Describe the command line."""
    form = argparse.RawDescriptionHelpFormatter
    about = "Complete the prompts of a file: in order, resumable, over all processes of torchrun."
    parser = Parser("python -m hf_kvopt batch", description=about, epilog=_EXAMPLES, formatter_class=form)
    add = parser.add_argument
    add("--model", required=True, help="hub id, folder, or smollm2 (from a wheel)")
    add("--input", required=True, help=f"file of prompts ({', '.join(_LOADERS)}), or the hub id of a dataset")
    add("--output", required=True, type=Path, help="JSON lines: each input row, its index and its completion")
    add("--split", default="train", help="of a hub dataset (%(default)s)")
    add("--column", help="column of the prompts (messages, prompt, text or input_ids)")
    add("--max-new-tokens", type=whole_number, default=256, help="of each completion (%(default)s)")
    add("--num-samples", type=whole_number, default=1, help="completions of each prompt (%(default)s)")
    add("--settings", type=_settings, default={}, help="other settings of generate(), as JSON (the model's own)")
    add("--seed", type=int, default=0, help="of the first sample; the others count on (%(default)s)")
    add_batching(parser, "prompts")
    add("--tp-size", type=whole_number, default=1, help="processes that share one model (%(default)s)")
    add("--shard", type=_shard, help="I/N: rows I, I + N, ... alone (the process and their number)")
    add("--device", help="such as cuda:0 or cpu (cuda of this process when there is one)")
    add("--dtype", default="auto", help="float32, bfloat16 or float16 (%(default)s)")
    add("--trust-remote-code", action="store_true", help="run code that comes with the model")
    return parser


def run(args: argparse.Namespace) -> int:
    """Complete what is missing, and join the rows when all are there."""
    rows, digest = _rows(args)
    try:
        names = prompt_columns(rows.column_names, args.column)
        require_free(rows.column_names, (*ADDED, INDEX))
    except ValueError as error:
        raise BadInput(str(error)) from None
    if args.output.exists():
        return _said_exists(args.output, len(rows))
    state = PartialState(cpu=args.device == "cpu" or not torch.cuda.is_available())
    index, count = _share(args, state)
    is_writing = args.tp_size == 1 or state.is_main_process
    with Parts(args.output, _about(args, digest, names, len(rows))) as parts:
        done = _agreed(parts.done(), args.tp_size)
        mine = [number for number in range(index, len(rows), count) if number not in done]
        if mine:
            _complete(args, state, rows, names, mine, parts if is_writing else None)
        if is_writing:
            missing = parts.join(len(rows))
            print(
                f"{missing:,} of {len(rows):,} rows are left to other processes"
                if missing
                else _summary(args.output, len(rows))
            )
    return 0


def _rows(args: argparse.Namespace) -> tuple[Any, str]:
    """Load the input; return its rows and a digest of them."""
    try:
        load_dataset = importlib.import_module("datasets").load_dataset  # takes seconds, and is an extra
    except ImportError as error:
        raise BadInput(
            f"reading --input needs the package datasets: got {error}; pip install 'hf-kvopt[evals]'"
        ) from error
    path = Path(args.input)
    try:
        if path.suffix not in _LOADERS and not path.exists():
            return load_dataset(args.input, split=args.split), f"{args.input} {args.split}"
        if path.suffix not in _LOADERS:
            raise ValueError(f"expected a file ending in {', '.join(_LOADERS)}, or the hub id of a dataset")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        return load_dataset(_LOADERS[path.suffix], data_files=str(path.resolve()), split="train"), digest
    except Exception as error:  # of datasets, pyarrow or the hub: all of them are about the input
        causes = [
            str(cause).strip().splitlines()[0] for cause in (error, error.__cause__) if cause and str(cause).strip()
        ]
        raise BadInput(f"cannot read rows from --input {args.input!r}: got {'; '.join(causes)}") from error


def _share(args: argparse.Namespace, state: PartialState) -> tuple[int, int]:
    """Return the first row of this process and the step to its next one."""
    shard, num_shards = args.shard or (0, 1)
    if args.tp_size == 1:
        return shard + num_shards * state.process_index, num_shards * state.num_processes
    if state.num_processes != args.tp_size:
        raise BadInput(
            f"--tp-size {args.tp_size} takes as many processes: got {state.num_processes}; start torchrun "
            f"--nproc-per-node {args.tp_size} once for each group, with --shard 0/N, 1/N, ..."
        )
    return shard, num_shards


def _agreed(done: set[int], tp_size: int) -> set[int]:
    """Return the finished rows as the first of the processes that share a model sees them."""
    if tp_size == 1:
        return done
    told = [done]
    broadcast_object_list(told)
    return told[0]


def _complete(
    args: argparse.Namespace,
    state: PartialState,
    rows: Any,
    names: Sequence[str],
    mine: Sequence[int],
    parts: Parts | None,
) -> None:
    """Complete rows, and add each to the part file as it ends; without `parts` another process adds them."""
    model = _load(args, state)
    own = {name: getattr(args, name) for name in (*BATCHING, "seed", "max_new_tokens")}
    settings = {**args.settings, **own}
    tokenizer = _tokenizer(args, names)
    try:
        completer = Completer(model, tokenizer, num_return_sequences=args.num_samples, **settings)
    except (ValueError, TypeError) as error:
        raise BadInput(str(error)) from error
    columns = (TextColumn("rows"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with completer, Progress(*columns, disable=not state.is_main_process) as bar:
        task = bar.add_task("", total=len(mine))
        for number, added in completer.complete(_prompts(rows, names, mine)):
            if parts is not None:
                kept = {"error": added["error"]} if added["error"] else {k: v for k, v in added.items() if k != "error"}
                parts.add({INDEX: number, **_present(rows[number]), **kept})
            bar.advance(task)


def _prompts(rows: Any, names: Sequence[str], mine: Sequence[int]) -> Iterator[tuple[int, Any]]:
    for number in mine:
        row = rows[number]
        yield number, next((row[name] for name in names if row[name] is not None), None)


def _present(row: dict[str, Any]) -> dict[str, Any]:
    """Drop empty columns: a table fills in those that other rows have."""
    return {name: value for name, value in row.items() if value is not None}


def _tokenizer(args: argparse.Namespace, names: Sequence[str]) -> Any:
    """Load the tokenizer; None for a model without one, where all prompts are token ids."""
    try:
        return AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    except (OSError, ValueError) as error:
        if list(names) == ["input_ids"]:
            return None
        why = str(error).strip().splitlines()[0]
        raise BadInput(f"cannot load the tokenizer of {args.model!r}, which prompts in {names} need: {why}") from error


def _load(args: argparse.Namespace, state: PartialState) -> PreTrainedModel:
    options: dict[str, Any] = {"dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    if args.tp_size > 1:
        options["distributed_config"] = DistributedConfig(tp_size=args.tp_size)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(args.model, **options)
        if args.tp_size == 1:
            torch.nn.Module.to(model, args.device or state.device)
    except (OSError, ValueError, RuntimeError) as error:
        raise BadInput(f"cannot load {args.model!r}: {str(error).strip().splitlines()[0]}") from error
    return model.eval()


def _about(args: argparse.Namespace, digest: str, columns: Sequence[str], num_rows: int) -> dict[str, Any]:
    """Return what the output depends on."""
    names = ("model", "cache", "dtype", "seed", "max_new_tokens", "num_samples", "settings")
    return {"input": digest, "columns": columns, "rows": num_rows, **{name: getattr(args, name) for name in names}}


def _said_exists(output: Path, num_rows: int) -> int:
    with output.open("rb") as lines:
        found = sum(1 for _ in lines)
    if found != num_rows:
        raise BadInput(f"--output {str(output)!r} exists: got {found:,} lines for {num_rows:,} rows; name another file")
    print(f"{output} is there already, with {found:,} rows: nothing to do")
    return 0


def _summary(output: Path, num_rows: int) -> str:
    """Count the rows of the output and those that have no completion."""
    with output.open("rb") as lines:
        errors = [row["error"] for row in map(json.loads, lines) if "error" in row]
    return f"{num_rows:,} rows in {output}, {len(errors):,} of them with an error" + (
        f", such as: {errors[0]}" if errors else ""
    )


def _settings(text: str) -> dict[str, Any]:
    """Parse `--settings`; an argument type."""
    try:
        found = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"must be a JSON object: got {text!r}, {error}") from None
    own = {"max_new_tokens", "num_return_sequences", "seed"}
    if not isinstance(found, dict) or own & set(found):
        raise argparse.ArgumentTypeError(
            f"must be a JSON object of settings of generate() that have no option of their own: got {text!r}; for "
            """example '{"do_sample": true, "temperature": 0.7}'"""
        )
    return found


def _shard(text: str) -> tuple[int, int]:
    """Parse `--shard`; an argument type."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 0 to N - 1: got {text!r}; for example 0/4")
    return int(index), int(count)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return make_parser().run(run, argv)
