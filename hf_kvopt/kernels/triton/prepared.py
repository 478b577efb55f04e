"""Prepared: launches that are checked and written down once, and run again for tensors of the same properties.

    q, pools, table, ... ──► shapes, strides, dtypes, device, alignment ──► known? ──► no: check, plan, compile
                                                                              └─────► yes: fill in pointers, launch

All that a plan depends on is in the key, so that a step of decoding pays for neither checks nor plans, nor for Triton's
own look at each argument. Values on the device (lengths, block numbers) are in no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from hf_kvopt.kernels.triton.checks import debug_enabled
from hf_kvopt.kernels.triton.launch import Launch

_MOST_KNOWN = 4096
_ALIGNED = 16  # bytes: Triton compiles another kernel for pointers that are not

Inputs = Sequence[Tensor | None]
Given = Sequence[Tensor | Sequence[int] | None]  # before it is checked


class Plan(NamedTuple):
    """Says what a call launches, and which tensors it returns."""

    launches: Sequence[Launch]
    results: tuple[Tensor, ...]  # allocated by the plan


_known: dict[Hashable, _Prepared] = {}


def run_prepared(given: Given, settings: Hashable, plan: Callable[[], Plan]) -> Sequence[Tensor]:
    """Run what `plan` writes down for `inputs`, and return its results.

    Args:
        given: all tensors of the call; the first one says where to allocate.
        settings: what else the plan depends on, the name of the op included.
        plan: checks the arguments, allocates, and writes the launches down; called only where tensors of these
            properties have not come before, and at each call under HF_KVOPT_DEBUG=1.
    """
    inputs = cast(Inputs, given)
    try:
        properties = [
            None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % _ALIGNED) for x in inputs
        ]
    except AttributeError:
        plan()  # names the argument that is no tensor
        raise
    key = (settings, *properties)
    known = _known.get(key)
    if known is None or debug_enabled():
        made = plan()
        known = _Prepared.of(made, inputs)
        if known is None:
            for launch in made.launches:
                launch.run()
            return made.results
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = known
    return known.run(inputs)


class _Prepared:
    """Launches in which tensors are places: of inputs, or of what is allocated for each run."""

    def __init__(self, replays: list[_Replay], made: list[Tensor], num_results: int) -> None:
        self._replays, self._num_results = replays, num_results
        self._made = [(x.shape, x.dtype) for x in made]

    @classmethod
    def of(cls, plan: Plan, inputs: Inputs) -> _Prepared | None:
        """Return a plan with places; None where it cannot be told which input an argument is."""
        pointers = [x.data_ptr() for x in inputs if x is not None]
        if len(set(pointers)) < len(pointers):
            return None
        made = list(plan.results)
        for launch in plan.launches:
            own = [launch.args[name] for name in launch.scratch]
            made += [x for x in own if isinstance(x, Tensor) and not any(x is y for y in (*inputs, *made))]
        replays = [_Replay(launch) for launch in plan.launches]
        # What is allocated anew is contiguous; strides of a plan are numbers in it.
        if not all(x.is_contiguous() for x in made) or not all(replay.find([*inputs, *made]) for replay in replays):
            return None
        return cls(replays, made, len(plan.results))

    def run(self, inputs: Inputs) -> Sequence[Tensor]:
        """Launch over `inputs`, and return the results."""
        like = inputs[0]
        assert like is not None
        made = [like.new_empty(shape, dtype=dtype) for shape, dtype in self._made] if self._made else []
        tensors = [*inputs, *made]
        for replay in self._replays:
            if replay.compiled is None:
                replay.first(tensors)
                continue
            values = replay.values.copy()
            for position, place in replay.positions:
                values[position] = tensors[place]
            replay.compiled(*values)
        return made[: self._num_results]


class _Replay:
    """One launch; its first run goes through Triton, and what that compiles is launched from then on."""

    def __init__(self, launch: Launch) -> None:
        self._launch = launch
        self._places: list[tuple[str, int, torch.dtype]] = []
        self.compiled: Callable[..., None] | None = None
        self.values: list[Any] = []  # of all parameters, None where a tensor goes
        self.positions: list[tuple[int, int]] = []  # of the parameter and of the tensor

    def find(self, tensors: Inputs) -> bool:
        """Find the place of each argument that is a tensor; tell whether all but constants have one."""
        args = dict(self._launch.args)
        for name, value in self._launch.args.items():
            if isinstance(value, Tensor) and name not in self._launch.constants:
                place = _place(value, tensors)
                if place is None:
                    return False
                self._places.append((name, place, value.dtype))
                args[name] = None  # nothing of the call that was planned is kept alive
        self._launch = self._launch._replace(args=args)
        return True

    def first(self, tensors: Inputs) -> None:
        """Launch through Triton over the tensors that stand at the places."""
        filled = {}
        for name, place, dtype in self._places:
            tensor = tensors[place]
            assert tensor is not None
            filled[name] = tensor if tensor.dtype == dtype else tensor.view(dtype)
        kernel = self._launch._replace(args={**self._launch.args, **filled}).run()
        device = next(iter(filled.values())).device
        # Interpreted kernels leave nothing to launch again, and with several cards each launch chooses its own.
        if kernel is None or (device.type == "cuda" and torch.cuda.device_count() > 1):
            return
        names = self._launch.kernel.arg_names
        self.values = [self._launch.args[name] for name in names]
        self.positions = [(names.index(name), place) for name, place, _ in self._places]
        self.compiled = kernel[self._launch.grid]


def _place(value: Tensor, tensors: Inputs) -> int | None:
    """Return the index of the tensor that an argument is, or is a view of in another dtype."""
    for i, tensor in enumerate(tensors):
        if tensor is value:
            return i
    for i, tensor in enumerate(tensors):
        if tensor is not None and value.nbytes == tensor.nbytes > 0 and value.data_ptr() == tensor.data_ptr():
            return i
    return None
