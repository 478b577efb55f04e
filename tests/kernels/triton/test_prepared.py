"""Launches that are run again for other tensors of the same properties compute over those, and over nothing else."""

import weakref

import pytest
import torch

from hf_kvopt.kernels.pattern import Pattern
from hf_kvopt.kernels.reference.attention import paged_reference
from hf_kvopt.kernels.triton import prepared
from hf_kvopt.kernels.triton.checks import debug_enabled
from hf_kvopt.kernels.triton.launch import Launch
from hf_kvopt.kernels.triton.paged_decode import paged_decode
from hf_kvopt.kernels.triton.store_kv import store_kv
from tests.kernels.triton.conftest import assert_close, make_paged, make_query


@pytest.fixture(autouse=True)
def known(monkeypatch):
    """Begin with nothing known."""
    made = {}
    monkeypatch.setattr(prepared, "_known", made)
    return made


class Filled:
    """Stands for what Triton compiled: launches the interpreter's kernel over arguments in the order of parameters."""

    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        names = self.launch.kernel.arg_names
        types = {name: x.dtype for name, x in self.launch.args.items() if isinstance(x, torch.Tensor)}

        def run(*values):
            args = dict(zip(names, values, strict=True))
            args = {n: x.view(types[n]) if n in types and x.dtype != types[n] else x for n, x in args.items()}
            self.launch.kernel[grid](**args, **self.launch.options)

        return run


@pytest.fixture
def compiled(monkeypatch):
    """Give launches something to run again, as Triton does on a card; counts how often it is asked."""
    run, times = Launch.run, []

    def first(self):
        run(self)
        times.append(self)
        return Filled(self)

    monkeypatch.setattr(Launch, "run", first)
    return times


def decode(lengths, seed, formats=("native", "native"), sinks=None):
    torch.manual_seed(seed)
    paged = make_paged(lengths, formats=formats)
    q, pattern = make_query(len(lengths), 4, 1, 32), Pattern(0.2, sinks=sinks)
    return paged_decode(q, paged.kv, pattern), paged_reference(q, paged.kv, pattern)


@pytest.mark.parametrize("formats", [("native", "native"), ("int8", "int4")], ids=str)
def test_other_tensors_of_the_same_properties_are_read(formats, compiled, known):
    for seed in range(3):
        sinks = torch.randn(4)
        out, reference = decode([40, 33], seed, formats, sinks)
        assert_close(out.out, reference.out)
        torch.testing.assert_close(out.lse, reference.lse, atol=1e-4, rtol=1e-4)
    assert len(known) == 1
    assert len(compiled) == 2, "the splits and their merge went through Triton once"


def test_lengths_are_in_no_plan(compiled, known):
    for lengths in ([40, 33], [48, 35], [33, 47]):
        out, reference = decode(lengths, 0)
        assert_close(out.out, reference.out)
    assert len(known) == 1


def test_what_a_plan_depends_on_is_told_apart(compiled, known):
    paged, q = make_paged([40, 33]), make_query(2, 4, 1, 32)
    patterns = [Pattern(0.2), Pattern(0.3), Pattern(0.2, window=5), Pattern(0.2, softcap=3.0)]
    patterns.append(Pattern(0.2, starts=torch.tensor([3, 0], dtype=torch.int32)))
    for pattern in (*patterns, *patterns):
        assert_close(paged_decode(q, paged.kv, pattern).out, paged_reference(q, paged.kv, pattern).out)
    assert len(known) == len(patterns)
    shifted = torch.empty(q.numel() + 1)[1:].view(q.shape).copy_(q)  # other strides and alignment
    assert_close(paged_decode(shifted, paged.kv, patterns[0]).out, paged_reference(q, paged.kv, patterns[0]).out)
    assert len(known) == len(patterns) + 1


@pytest.mark.parametrize("first", ["one tensor twice", "two tensors"])
def test_keys_and_values_that_are_one_tensor_leave_nothing_wrong_behind(first, compiled, known):
    def store(k, v):
        pools = torch.zeros(2, 2, 16, 2, 32).unbind()
        store_kv(k, v, *pools, torch.tensor([3, 20]))
        for x, pool in zip((k, v), pools, strict=True):
            torch.testing.assert_close(pool.view(32, 2, 32)[[3, 20]], x.transpose(1, 2)[0])

    k, v = torch.randn(2, 1, 2, 2, 32).unbind()
    calls = [(k, k), (k, v), (v, k), (v, v)]
    for call in calls if first == "one tensor twice" else (calls[1], calls[0], *calls[2:]):
        store(*call)
    assert len(known) == 1


def test_what_is_found_nowhere_is_not_run_again(known):
    x = torch.randn(2, 4)
    launch = Launch(None, (1, 1, 1), {"a_ptr": x * 2}, {})
    runs = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Launch, "run", lambda self: runs.append(self.args["a_ptr"]))
        for factor in (2, 3):
            plan = prepared.Plan((launch._replace(args={"a_ptr": x * factor}),), ())
            prepared.run_prepared((x,), "test", lambda plan=plan: plan)
    assert not known
    assert [float(run[0, 0] / x[0, 0]) for run in runs] == [2, 3]


def test_strides_of_what_is_not_contiguous_are_not_kept(known):
    def plan():
        args = {"a_ptr": x, "s_ptr": x.new_empty(4, 2).t()}
        return prepared.Plan((Launch(Counted(), (1, 1, 1), args, {}, ("s_ptr",)),), ())

    x = torch.randn(2, 4)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Launch, "run", lambda self: None)
        prepared.run_prepared((x,), "test", plan)
    assert not known


def test_constants_are_kept_and_scratch_is_made_anew(compiled):
    x, constant = torch.randn(2, 4), torch.randn(2, 4)
    seen = []

    class Kernel:
        arg_names = ("a_ptr", "c_ptr", "s_ptr", "n")

        def __getitem__(self, grid):
            return lambda a_ptr, c_ptr, s_ptr, n: seen.append((a_ptr, c_ptr, s_ptr, n))

    def plan():
        args = {"a_ptr": x, "c_ptr": constant, "s_ptr": x.new_empty(3), "n": 7}
        return prepared.Plan((Launch(Kernel(), (1, 1, 1), args, {}, ("s_ptr",), ("c_ptr",)),), ())

    for given in (x, y := torch.randn(2, 4), x):
        prepared.run_prepared((given,), "test", plan)
    assert [entry[0] is wanted for entry, wanted in zip(seen, (x, y, x), strict=True)] == [True] * 3
    assert all(entry[1] is constant and entry[3] == 7 for entry in seen)
    assert all(entry[2].shape == (3,) and bool(entry[2].isnan().all()) for entry in seen)
    assert len({id(entry[2]) for entry in seen}) == 3


def test_few_are_remembered(monkeypatch, known):
    monkeypatch.setattr(prepared, "_MOST_KNOWN", 3)
    paged, q = make_paged([20]), make_query(1, 4, 1, 32)
    for n in range(1, 8):
        pattern = Pattern(0.1 * n)
        assert_close(paged_decode(q, paged.kv, pattern).out, paged_reference(q, paged.kv, pattern).out)
        assert len(known) <= 3


def test_debugging_looks_at_values_at_each_call(known):
    paged, q = make_paged([20, 7]), make_query(2, 4, 1, 32)
    paged_decode(q, paged.kv, Pattern(0.2))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("HF_KVOPT_DEBUG", "1")
        debug_enabled.cache_clear()
        with pytest.raises(ValueError, match="seq_lens must lie between"):
            paged_decode(q, paged.kv._replace(seq_lens=torch.tensor([99, 1], dtype=torch.int32)), Pattern(0.2))
    debug_enabled.cache_clear()


def test_what_is_no_tensor_is_named(known):
    paged, q = make_paged([20, 7]), make_query(2, 4, 1, 32)
    with pytest.raises(TypeError, match="starts must be an int32 tensor: got list"):
        paged_decode(q, paged.kv, Pattern(0.2, starts=[0, 1]))


class Counted:
    """A kernel that does nothing."""

    arg_names = ("a_ptr",)

    def __getitem__(self, grid):
        return lambda a_ptr: None


def run_on(x):
    prepared.run_prepared((x,), "test", lambda: prepared.Plan((Launch(Counted(), (1, 1, 1), {"a_ptr": x}, {}),), ()))


@pytest.mark.parametrize(
    "other",
    [
        torch.zeros(4, 8), torch.zeros(8, 8).half(), torch.zeros(8, 8).t(), torch.zeros(65)[1:].view(8, 8),
        torch.zeros(8, 8, 1),
    ],
    ids=["shape", "dtype", "strides", "alignment", "dimensions"],
)  # fmt: skip
def test_each_property_of_a_tensor_is_in_the_key(other, known):
    for x in (torch.zeros(8, 8), torch.zeros(8, 8)):
        run_on(x)
    assert len(known) == 1
    run_on(other)
    assert len(known) == 2


def test_no_tensor_of_a_call_is_kept_alive(compiled):
    x = torch.zeros(8, 8)
    for _ in range(3):
        run_on(x)
        y = torch.zeros(8, 8)
        run_on(y)
        gone = weakref.ref(y)
        del y
        assert gone() is None
