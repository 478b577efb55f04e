"""PEFT: adapters switched between calls, taken off, merged, and one for each row."""

from collections.abc import Iterator
from typing import Any

import pytest

import hf_kvopt
from tests.helpers import generate, tiny_model
from tests.neighbours.options import INPUTS, OPTIONS, check, seeded, tokens

peft = pytest.importorskip("peft", reason="pip install 'hf-kvopt[neighbours]'")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def adapted() -> Iterator[Any]:
    """A model with two adapters of random weights, "default" and "other"."""
    seeded()
    lora = {"r": 4, "lora_alpha": 32, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": False}
    model = peft.get_peft_model(tiny_model("full", "eager"), peft.LoraConfig(**lora))
    model.add_adapter("other", peft.LoraConfig(**lora))
    model.set_adapter("default")
    return model.eval()


def test_a_wrapped_model_gives_equal_tokens_under_everything(adapted: Any) -> None:
    base = adapted.get_base_model()
    check(base, adapted)
    check(base)


def test_adapters_are_told_apart_by_shared_prefixes(adapted: Any) -> None:
    want = {}
    for name in ("default", "other"):
        adapted.set_adapter(name)
        want[name] = tokens(adapted)
    with adapted.disable_adapter():
        plain = tokens(adapted)
    assert plain not in want.values()
    assert want["default"] != want["other"]
    hf_kvopt.enable(adapted, prefix_sharing=True)
    for name in ("default", "other", "default", "other"):
        adapted.set_adapter(name)
        assert tokens(adapted) == want[name]
    assert hf_kvopt.prefix_store(adapted).stats().hits == 4  # the second call of each adapter
    with adapted.disable_adapter():
        assert tokens(adapted) == plain
    adapted.merge_adapter()
    assert tokens(adapted) == want["other"]
    assert hf_kvopt.prefix_store(adapted).stats().hits == 4
    adapted.unmerge_adapter()
    assert tokens(adapted) == want["other"]


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "prompt lookup" and "int" not in name])
def test_rows_go_through_adapters_of_their_own(adapted: Any, name: str) -> None:
    names = ["default", "other"], ["other", "default"]
    want = [generate(adapted, INPUTS, adapter_names=rows).tolist() for rows in names]
    assert want[0] != want[1]
    hf_kvopt.enable(adapted, **OPTIONS[name])
    for _ in range(2):
        assert [generate(adapted, INPUTS, adapter_names=rows).tolist() for rows in names] == want


def test_drafts_for_rows_with_adapters_of_their_own_are_refused(adapted: Any) -> None:
    hf_kvopt.enable(adapted, draft="prompt_lookup")
    with pytest.raises(hf_kvopt.UnsupportedModel, match="adapters of their own"):
        generate(adapted, INPUTS, adapter_names=["default", "other"])
    row = {name: tensor[:1] for name, tensor in INPUTS.items()}
    got = generate(adapted, row, adapter_names=["other"]).tolist()
    hf_kvopt.disable(adapted)
    assert got == generate(adapted, row, adapter_names=["other"]).tolist()
