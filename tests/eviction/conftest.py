"""All tests here run on one thread."""

import pytest


@pytest.fixture(autouse=True)
def on_one_thread(one_thread):
    """Tiny models are slower on many threads than on one."""
