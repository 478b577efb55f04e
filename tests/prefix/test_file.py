"""A saved store comes back whole for the same model, and not at all for anything else."""

import json
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from evals._common.outliers import SMALLEST, add_outliers
from hf_kvopt import CACHE_KEYWORD, CacheStateError, PrefixStore
from tests.helpers import KINDS, tiny_config, tiny_model
from tests.prefix.lora import adapt, adapters_of
from tests.prefix.prefixes import batch, counted, eager, shared_model, text, turn

SYSTEM = text(70, seed=7)


def saved(path: Path, kind: str = "full", **options: object) -> Path:
    """Write a store that knows two texts with a common beginning."""
    model, store = shared_model(kind, **options)
    turn(store, model, batch(SYSTEM))
    turn(store, model, batch(SYSTEM[:40] + text(9, seed=1)))
    store.save(path / "store.safetensors")
    return path / "store.safetensors"


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_saved_is_found_and_gives_the_same_tokens(kind: str, tmp_path: Path) -> None:
    path, model = saved(tmp_path, kind), tiny_model(kind)
    store = PrefixStore.load(path, model)
    store.check_integrity()
    for inputs in (batch(SYSTEM), batch(SYSTEM[:40] + text(9, seed=1))):
        with counted() as forwards:
            assert torch.equal(turn(store, model, inputs), eager(kind, inputs))
        assert forwards[0] == 1


@pytest.mark.parametrize(
    "options",
    [
        {"format": "int8"},
        {"format": "int4", "block_size": 16},
        {"format": "k8v4", "block_size": 16, "layer_formats": {0: "native", "last": "int8"}},
        {"format": "fp8_e5m2"},
    ],
    ids=["int8", "int4", "mixed", "fp8"],
)
def test_formats_and_scales_come_back(options: dict[str, object], tmp_path: Path) -> None:
    model = tiny_model()
    store = PrefixStore.load(saved(tmp_path, **options), model)
    fresh = PrefixStore(model, **options)
    known = turn(store, model, batch(SYSTEM))
    assert store.stats().hits == 1
    assert torch.equal(known, turn(fresh, model, batch(SYSTEM)))


@pytest.mark.parametrize("name", ["int8", "int4/int4", "int4"])
@torch.no_grad()
def test_what_was_taken_from_loud_keys_comes_back(name: str, tmp_path: Path) -> None:
    """Without it the rows behind a loaded prefix would be read with another shift than the prefix."""
    model = add_outliers(tiny_model())
    store = PrefixStore(model, format=name)
    turn(store, model, batch(SYSTEM))
    store.save(tmp_path / "s")
    loaded = PrefixStore.load(tmp_path / "s", model)
    logits = []
    for one in (store, loaded):
        cache = one.cache(**batch(SYSTEM + text(20, seed=1)))
        assert cache.get_seq_length() >= len(SYSTEM)
        keys = cache.layers[0].keys
        assert keys is not None
        assert keys.abs().max() > SMALLEST / 2
        inputs = batch(SYSTEM + text(20, seed=1))
        missing = inputs["input_ids"][:, cache.get_seq_length() :]
        logits.append(model(missing, attention_mask=inputs["attention_mask"], **{CACHE_KEYWORD: cache}).logits)
    assert torch.equal(*logits)


def test_namespaces_come_back_and_old_weights_do_not(tmp_path: Path) -> None:
    model, store = shared_model()
    turn(store, model, batch(text(30, seed=3)))
    with torch.no_grad():
        model.lm_head.weight.mul_(1.0)  # the same numbers, but the store cannot know
    cache = store.cache(**batch(SYSTEM), namespace="mine")
    store.commit(cache, model.generate(**batch(SYSTEM), **{CACHE_KEYWORD: cache}, max_new_tokens=2))
    store.save(tmp_path / "s")
    loaded = PrefixStore.load(tmp_path / "s", model)
    assert loaded.match_length(SYSTEM, namespace="mine") == 70
    assert loaded.match_length(SYSTEM) == loaded.match_length(text(30, seed=3)) == 0


def test_an_empty_store_can_be_saved(tmp_path: Path) -> None:
    model, store = shared_model()
    store.save(tmp_path / "s")
    assert torch.equal(
        turn(PrefixStore.load(tmp_path / "s", model), model, batch(SYSTEM)), eager("full", batch(SYSTEM))
    )


def test_a_store_of_a_config_has_no_identity_to_save(tmp_path: Path) -> None:
    with pytest.raises(CacheStateError, match="config"):
        PrefixStore(tiny_config("full")).save(tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("change", ["other weights", "one tensor", "one number", "other dtype", "other model"])
def test_another_model_is_refused(change: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    model = tiny_model(seed=1 if change == "other weights" else 0, kind="mixed" if change == "other model" else "full")
    if change == "one tensor":
        with torch.no_grad():
            model.model.layers[1].self_attn.k_proj.weight.add_(1e-3)
    if change == "one number":  # which no sample of the weights would meet
        with torch.no_grad():
            model.model.embed_tokens.weight.view(-1)[1] += 1e-3
    if change == "other dtype":
        model = model.to(torch.bfloat16)
    with pytest.raises(CacheStateError, match="another model"):
        PrefixStore.load(path, model)


def rewritten(path: Path, change) -> None:
    """Write the file again with its manifest changed, and signed anew."""
    import hashlib

    with safe_open(path, "pt") as file:
        manifest = json.loads(file.metadata()["manifest"])
    tensors = load_file(path)
    change(manifest, tensors)
    line = json.dumps(manifest, sort_keys=True)
    save_file(tensors, path, metadata={"manifest": line, "sha256": hashlib.sha256(line.encode()).hexdigest()})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest, tensors: manifest.update(version=0), "version"),
        (lambda manifest, tensors: tensors.pop("layer 0 keys"), "missing or were added"),
        (lambda manifest, tensors: tensors.update(extra=torch.zeros(1)), "missing or were added"),
        (lambda manifest, tensors: tensors["layer 1 values"].add_(1), "layer 1 values is damaged"),
        (lambda manifest, tensors: tensors.update({"layer 0 keys": tensors["layer 0 keys"][:-1].clone()}), "damaged"),
    ],
    ids=["version", "a tensor less", "a tensor more", "other numbers", "fewer blocks"],
)
def test_what_does_not_agree_with_the_manifest_is_refused(change, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path)
    rewritten(path, change)
    with pytest.raises(CacheStateError, match=message):
        PrefixStore.load(path, tiny_model())


def test_no_truncated_file_and_no_file_with_a_changed_byte_loads(tmp_path: Path) -> None:
    path, model = saved(tmp_path), tiny_model()
    whole = path.read_bytes()
    draws = torch.Generator().manual_seed(0)
    places = torch.randint(0, len(whole), (60,), generator=draws).tolist()
    for place in [0, 7, 8, 9, len(whole) - 1, *places]:
        path.write_bytes(whole[:place])
        with pytest.raises(CacheStateError, match="not loaded"):
            PrefixStore.load(path, model)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(CacheStateError, match="not loaded"):
            PrefixStore.load(path, model)
    path.write_bytes(whole)
    assert PrefixStore.load(path, model).match_length(SYSTEM) == 70


def test_a_file_that_is_not_there_and_one_of_something_else(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        PrefixStore.load(tmp_path / "none", tiny_model())
    save_file({"weight": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(CacheStateError, match="manifest"):
        PrefixStore.load(tmp_path / "weights", tiny_model())


def test_a_smaller_cap_takes_what_fits_or_says_so(tmp_path: Path) -> None:
    from hf_kvopt import OutOfBlocks

    with pytest.raises(OutOfBlocks, match="max_tokens"):
        PrefixStore.load(saved(tmp_path), tiny_model(), max_tokens=16)


def test_a_cap_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"max_tokens must be a positive number.*got 0"):
        PrefixStore.load(saved(tmp_path), tiny_model(), max_tokens=0)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_kvopt.prefix import file as prefix_file

    path, model = saved(tmp_path), tiny_model()
    before = path.read_bytes()

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(prefix_file, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        PrefixStore.load(path, model).save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def changed(model: torch.nn.Module, change: str) -> torch.nn.Module:
    layer = model.model.layers[0]
    if change == "frequencies":
        model.model.rotary_emb.inv_freq.mul_(0.5)
    if change == "rotary scale":
        model.model.rotary_emb.attention_scaling = 0.5
    if change == "adapters' scale":
        for adapter in adapters_of(model):
            adapter.scaling["first"] = 3.0
    if change == "active adapter":
        for adapter in adapters_of(model):
            adapter._active_adapter = ["second"]
    if change == "epsilon":
        layer.input_layernorm.variance_epsilon = 0.5
    if change == "activation":
        layer.mlp.act_fn = torch.nn.ReLU()
    if change == "tensor in a list":
        layer.listed[0].mul_(2)
    return model


@pytest.mark.parametrize(
    "change",
    [
        "nothing", "frequencies", "rotary scale", "adapters' scale", "active adapter", "epsilon", "activation",
        "tensor in a list",
    ],
)  # fmt: skip
def test_a_model_with_other_settings_is_refused(change: str, tmp_path: Path) -> None:
    def build() -> torch.nn.Module:
        model = adapt(tiny_model(), "first", "second").eval()
        model.model.layers[0].listed = [torch.ones(3)]
        return model

    model, path = build(), tmp_path / "s"
    store = PrefixStore(model)
    turn(store, model, batch(SYSTEM))
    store.save(path)
    if change == "nothing":
        assert PrefixStore.load(path, build()).match_length(SYSTEM) == len(SYSTEM)
        return
    with pytest.raises(CacheStateError, match="another model"):
        PrefixStore.load(path, changed(build(), change))


@pytest.mark.parametrize("what", ["hook", "hook on all modules", "forward", "soft prompt", "offloaded"])
def test_what_a_file_cannot_say_is_refused(what: str, tmp_path: Path) -> None:
    path, model = saved(tmp_path), tiny_model()
    store, module, hook = PrefixStore(model), model.model.layers[0].mlp, None
    if what == "hook":
        hook = module.register_forward_hook(lambda *_: None)
    if what == "hook on all modules":
        hook = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    if what == "forward":
        module.forward = lambda x: x
    if what == "soft prompt":
        model.prepare_inputs_for_generation = lambda *args, **kwargs: {}
    if what == "offloaded":
        cpu_offload(model, torch.device("cpu"))
    try:
        for use in (lambda: store.save(tmp_path / "new"), lambda: PrefixStore.load(path, model)):
            with pytest.raises(CacheStateError, match="offloaded" if what == "offloaded" else "take it off"):
                use()
    finally:
        if hook is not None:
            hook.remove()
    assert not (tmp_path / "new").exists()
