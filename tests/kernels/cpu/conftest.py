"""Fixtures for the compiled kernels of a CPU."""

from collections.abc import Iterator

import pytest

from hf_kvopt.kernels.cpu import program


@pytest.fixture
def avx2(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Compile for vectors of 8 lanes, as on a processor without AVX-512."""
    monkeypatch.setattr(program._machine(), "lanes_here", lambda: 8)
    program.lanes.cache_clear()
    assert program.lanes() == 8
    yield
    monkeypatch.undo()
    program.lanes.cache_clear()
