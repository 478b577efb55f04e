"""Fixtures for all tests."""

import os
from collections.abc import Iterator

import pytest
import torch

# What speculation learns on tiny models is no use to anybody, and tests must not learn from each other.
os.environ.setdefault("HF_KVOPT_REMEMBER", "0")
# No test needs the hub, and where it cannot be reached each name that is asked for waits for a while.
os.environ.setdefault("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def one_thread() -> Iterator[None]:
    """Tiny models are slower on many threads than on one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
