"""How often a prompt is looked for: once a row, and once more in each round of forwards that a batch is worth."""

import pytest
import torch

from hf_kvopt import PrefixStore
from hf_kvopt.prefix.index import PrefixIndex
from tests.helpers import tiny_config


@pytest.mark.parametrize("batch", [1, 3])
def test_a_prompt_is_matched_once_a_row(batch, monkeypatch):
    looks = []
    match = PrefixIndex.match
    monkeypatch.setattr(PrefixIndex, "match", lambda *args: looks.append(args) or match(*args))
    store = PrefixStore(tiny_config("full"))
    ids = torch.randint(3, 60, (batch, 40))
    store.cache(ids)
    assert len(looks) == batch
