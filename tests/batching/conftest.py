"""Tests of one room run on one thread, on one tiny model of each kind."""

import pytest


@pytest.fixture(autouse=True)
def _quick(one_thread: None) -> None:
    """Small tensors all over."""
