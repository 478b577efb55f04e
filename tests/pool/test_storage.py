"""How a pool lies in memory, and who writes to it."""

import copy
import pickle

import torch

from hf_kvopt.kernels.store import WRITERS
from hf_kvopt.pool import plane
from hf_kvopt.pool.storage import KVPool
from hf_kvopt.quant import get_kv_format


def test_blocks_that_grow_while_they_are_offloaded_stay_as_kernels_want_them(monkeypatch):
    states = torch.zeros(1, 3, 0, 32)
    monkeypatch.setattr(plane, "runs_kernel", lambda tensor: True)
    pool = KVPool(states, states, 16, 4)
    assert pool.keys.codes.is_contiguous()
    monkeypatch.setattr(plane, "runs_kernel", lambda tensor: False)  # as of CPU memory
    pool.resize(9, [0, 1], [3, 4])
    assert pool.keys.codes.is_contiguous()
    assert not KVPool(states, states, 16, 4).keys.codes.is_contiguous()


def test_a_pool_that_was_pickled_asks_anew_for_its_writer():
    states = torch.zeros(1, 3, 0, 32)
    pool = KVPool(states, states, 16, 4, get_kv_format("int8"))
    assert pool.writer in WRITERS
    for twin in (pickle.loads(pickle.dumps(pool)), copy.deepcopy(pool)):
        assert twin.writer.name == pool.writer.name


def test_states_that_are_no_plain_tensors_are_written_by_torch():
    states, slots = torch.randn(2, 3, 5, 32), torch.arange(10)
    plain, wrapped = (KVPool(states, states, 16, 4, get_kv_format("int8")) for _ in range(2))
    plain.store(states, states, None, lambda: slots)
    wrapped.store(torch.nn.Parameter(states, requires_grad=False), states, None, lambda: slots)
    assert torch.equal(plain.keys.codes, wrapped.keys.codes)
    assert torch.equal(plain.values.codes, wrapped.values.codes)
