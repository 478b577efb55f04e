"""Fixtures for the tests of docs/ and of docstrings."""

import pytest


@pytest.fixture(autouse=True)
def _few_threads(one_thread: None) -> None:
    """Run every page and docstring on one thread: the model is small."""
