"""Tiny models are slower on many threads than on one."""

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """All tests of the room."""
