"""Distribution of work over the processes of `accelerate launch`; a single process does all of it."""

import argparse
import atexit
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from evals._common.cli import BadArgumentError

T = TypeVar("T")


class Shard(NamedTuple):
    """Part of the work of one process."""

    process: int
    num_processes: int

    @property
    def is_main(self) -> bool:
        """Return whether this is the process that reports."""
        return self.process == 0

    def of(self, items: Sequence[T]) -> list[T]:
        """Return this process's items: every `num_processes`-th one, so that neighbours are spread over processes."""
        return list(items[self.process :: self.num_processes])

    def gather(self, results: Sequence[T]) -> list[T]:
        """Return the results of all processes to each of them, in the order of the items."""
        if self.num_processes == 1:
            return list(results)
        parts = [list[T]() for _ in range(self.num_processes)]
        for process, result in gather_object([(self.process, result) for result in results]):
            parts[process].append(result)
        longest = max(map(len, parts))
        return [part[turn] for turn in range(longest) for part in parts if turn < len(part)]


def join_shards(args: argparse.Namespace) -> Shard:
    """Join the other processes, and select a device for this one if `--device` names none.

    Raises:
        BadArgumentError: `--device-map` would lay every process's model over the same devices.
    """
    # accelerate joins several processes without a GPU only when told to use the CPU.
    is_cpu = args.device == "cpu" or (args.device is None and not torch.accelerator.is_available())
    state = PartialState(cpu=is_cpu)
    if state.num_processes > 1:
        if args.device_map is not None:
            raise BadArgumentError(
                f"--device-map {args.device_map} lays one model over all devices: got {state.num_processes} "
                "processes; drop it, or start one process"
            )
        # While the group exists, its threads run on into the end of the process, which then sometimes aborts.
        atexit.register(state.destroy_process_group)
        args.device = args.device or str(state.device)
    return Shard(state.process_index, state.num_processes)
