"""Fixtures for all tests."""

import os
from collections.abc import Iterator

import pytest
import torch
from torch._dynamo.utils import counters

# What speculation learns on tiny models is no use to anybody, and tests must not learn from each other.
os.environ.setdefault("HF_KVOPT_REMEMBER", "0")
# No test needs the hub, and where it cannot be reached each name that is asked for waits for a while.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture
def fresh_graphs() -> Iterator[None]:
    """Let torch.compile know no graph of another test, and count from nothing."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models are slower on many threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
