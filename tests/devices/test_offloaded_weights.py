"""Weights in CPU memory or on a disk, brought to the device by accelerate: tokens equal those of a whole model."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

import hf_kvopt
from hf_kvopt import CacheStateError, PagedCache
from hf_kvopt.pool.handle import KVHandle
from tests.attention.models import case_named
from tests.devices.placements import CPU, PLACEMENTS, load
from tests.helpers import generate, prompt, states, tiny_config, tiny_model
from tests.models.tiny import build
from tests.speculation.drafters import noisy
from tests.speculation.heads import KINDS as HEADS
from tests.speculation.heads import tiny_head

pytestmark = pytest.mark.usefixtures("one_thread")
INPUTS = prompt(25, 18)
KINDS = ("full", "sliding", "mixed", "latent")
CACHES: dict[str, dict[str, Any]] = {
    "paged": {"cache": "paged"},
    "int8": {"cache": "int8"},
    "int4": {"cache": "int4", "block_size": 16},
    "fixed": {"cache": "paged", "compileable": True, "max_tokens": 128},
    "shared": {"cache": "paged", "prefix_sharing": True},
    "shared int8": {"cache": "int8", "prefix_sharing": True},
}
DRAFTS: dict[str, Callable[[], Any]] = {
    "prompt lookup": lambda: "prompt_lookup",
    "lookahead": lambda: "lookahead",
    "assistant": noisy,
    **{head: functools.partial(tiny_head, head) for head in HEADS},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write each tiny model to a folder."""
    written = {}
    for kind in KINDS:
        written[kind] = tmp_path_factory.mktemp(kind)
        model = build(case_named("deepseek_v3")) if kind == "latent" else tiny_model(kind, "eager")
        model.save_pretrained(written[kind])
    return written


@pytest.fixture(params=PLACEMENTS)
def placed(
    request: pytest.FixtureRequest, folders: dict[str, Path], tmp_path: Path
) -> Callable[[str], PreTrainedModel]:
    """Return what loads the model of a kind with its weights elsewhere."""
    return lambda kind: PLACEMENTS[request.param](folders[kind], tmp_path)


def twice(model: PreTrainedModel, **options: Any) -> list[Tensor]:
    """Return the tokens of two calls on an enabled model, the second of which may find what the first one read."""
    hf_kvopt.enable(model, **options)
    return [generate(model, INPUTS) for _ in range(2)]


def assert_same(got: list[Tensor], want: list[Tensor]) -> None:
    """Check tokens call by call."""
    for ours, theirs in zip(got, want, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["paged", "int8"])
def test_each_kind_of_model_equals_the_whole_one(
    placed: Callable[[str], PreTrainedModel], folders: dict[str, Path], kind: str, name: str
) -> None:
    model = placed(kind)
    assert any(weight.is_meta for weight in model.parameters())
    want = twice(load(folders[kind]), **CACHES[name])
    assert_same(twice(model, **CACHES[name]), want)
    if name == "paged":
        plain = load(folders[kind])
        assert torch.equal(want[0], generate(plain, INPUTS, DynamicCache(config=plain.config)))


@pytest.mark.parametrize("name", CACHES)
def test_each_cache_equals_the_whole_model(
    placed: Callable[[str], PreTrainedModel], folders: dict[str, Path], name: str
) -> None:
    model = placed("full")
    assert_same(twice(model, **CACHES[name]), twice(load(folders["full"]), **CACHES[name]))
    if name.startswith("shared"):
        stats = hf_kvopt.prefix_store(model).stats()
        assert stats.hits == len(INPUTS["input_ids"])


@pytest.mark.parametrize("name", DRAFTS)
def test_each_draft_equals_the_whole_model(
    placed: Callable[[str], PreTrainedModel], folders: dict[str, Path], name: str
) -> None:
    drafting = hf_kvopt.speculative(DRAFTS[name](), gamma=3, fallback=False)
    got = twice(placed("full"), draft=drafting)
    assert drafting.stats.calls == 2
    assert_same(got, twice(load(folders["full"])))


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"do_sample": True}], ids=["beams", "sampling"])
def test_beams_and_seeded_sampling_equal_the_whole_model(
    placed: Callable[[str], PreTrainedModel], folders: dict[str, Path], options: dict[str, Any]
) -> None:
    texts = []
    for model in (placed("full"), load(folders["full"])):
        torch.manual_seed(3)
        texts.append(generate(model, INPUTS, PagedCache(config=model.config), **options))
    assert torch.equal(*texts)


def test_an_assistant_may_be_offloaded_as_well(
    placed: Callable[[str], PreTrainedModel], folders: dict[str, Path]
) -> None:
    drafting = hf_kvopt.speculative(placed("full"), gamma=3, fallback=False)
    assert_same(twice(load(folders["full"]), draft=drafting), twice(load(folders["full"])))
    assert drafting.stats.mean_accepted_length > 2


def test_a_store_of_an_offloaded_model_is_not_saved(placed: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    model = hf_kvopt.enable(placed("full"), prefix_sharing=True)
    want = generate(model, INPUTS)
    store = hf_kvopt.prefix_store(model)
    with pytest.raises(CacheStateError, match="offloaded"):
        store.save(tmp_path / "store.safetensors")
    assert torch.equal(generate(model, INPUTS), want)


# Layers on two devices. The meta device stands for a second one: it holds no values, so places are checked, not tokens.


@pytest.mark.parametrize("kind", ["full", "mixed"])
def test_each_pool_lies_with_its_layer_and_tables_are_on_both_devices(kind: str) -> None:
    config = tiny_config(kind)
    cache = PagedCache(config=config)
    places = [CPU, torch.device("meta"), torch.device("meta")][: config.num_hidden_layers]
    for num_tokens in (9, 1, 30):
        for layer_idx, device in enumerate(places):
            keys, values = (x.to(device) for x in states(2, num_tokens))
            for handle in cache.update(keys, values, layer_idx):
                assert isinstance(handle, KVHandle)
                assert handle.device == device
            layer = cache.layers[layer_idx]
            assert layer.pool.keys.codes.device == layer.pool.values.codes.device == device
            blocks, lens, _ = layer.table.rows_on(device)
            assert blocks.device == lens.device == device
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([1]))
    cache.check_integrity()
