"""Rows that begin alike read their beginning together, and every token is that of plain transformers."""

import pytest
import torch

from hf_kvopt import PagedCache
from hf_kvopt.kernels.cpu import paged_attention
from hf_kvopt.kernels.cpu.program import can_compile
from tests.helpers import eager_tokens, generate, prompt, tiny_model

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    """The calls that read tokens for several rows at once: (runs of rows, tokens of the longest)."""
    seen = []
    attend_shared = paged_attention._attend_shared

    def count(shared, *rest):
        seen.append((len(shared.tokens), shared.most))
        attend_shared(shared, *rest)

    monkeypatch.setattr(paged_attention, "MIN_SAVED_BYTES", 0)
    monkeypatch.setattr(paged_attention, "_attend_shared", count)
    return seen


@pytest.mark.parametrize("lengths", [(150,), (150, 99), (90, 150, 20)], ids=str)
def test_beams_read_what_they_come_from_together(lengths, shared):
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 20}
    tokens = generate(tiny_model(), prompt(*lengths), PagedCache(), **options)
    assert torch.equal(tokens, eager_tokens("full", *lengths, **options))
    assert (len(lengths), max(lengths) // 64 * 64) in shared
