"""Runs the tests of this room on one thread: tiny models are slower on many."""

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Apply `one_thread` to all tests of the room."""
