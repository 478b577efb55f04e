"""Whatever changes what a forward computes makes stored prefixes unknown; what changes nothing goes on finding them."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AttentionInterface, DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import hf_kvopt
from hf_kvopt import CACHE_KEYWORD, CacheStateError, PrefixStore
from hf_kvopt.prefix.identity import ModelIdentity
from tests.helpers import generate, tiny_model
from tests.prefix.changes import CHANGES, keys_of, with_gradients
from tests.prefix.lora import LoraLinear, adapt, adapters_of, by_row
from tests.prefix.prefixes import batch, text, turn

SYSTEM = text(70, seed=7)
INPUTS = batch(SYSTEM, SYSTEM[:41])


def sharing(model: PreTrainedModel | None = None) -> tuple[PreTrainedModel, PrefixStore]:
    """A model that shares prefixes, under the attention that it has, and knows those of INPUTS."""
    model = hf_kvopt.enable(model or tiny_model(attention="sdpa"), attention=False, prefix_sharing=True)
    store = hf_kvopt.prefix_store(model)
    generate(model, INPUTS)
    assert num_found(model, store) == 2
    return model, store


def num_found(model: PreTrainedModel, store: PrefixStore, inputs: dict[str, Tensor] = INPUTS) -> int:
    """Generate with what the store knows: how many rows found something, and the tokens must be the model's own."""
    hits = store.stats().hits
    output = generate(model, inputs)
    assert torch.equal(output, generate(model, inputs, DynamicCache(config=model.config)))
    store.check_integrity()
    return store.stats().hits - hits


@contextmanager
def entered(change: AbstractContextManager[Any] | None) -> Iterator[None]:
    """A change that may be one for good."""
    if change is None:
        yield
    else:
        with change:
            yield


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_a_forward_makes_stored_prefixes_unknown(name: str) -> None:
    model, store = sharing()
    with entered(CHANGES[name](model)):
        assert num_found(model, store) == 0
        assert num_found(model, store) == 2


@pytest.mark.parametrize("change", ["autocast", "bfloat16", "other dtype through data"])
def test_another_dtype_makes_another_state(change: str) -> None:
    model = tiny_model()
    identity = ModelIdentity(model)
    before = identity.state()
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        if change == "bfloat16":
            model.to(torch.bfloat16)
        if change == "other dtype through data":
            keys_of(model).weight.requires_grad_(False)
            keys_of(model).weight.data = keys_of(model).weight.data.view(torch.int32)
        assert identity.state() != before
        assert identity.state() == identity.state()


@pytest.mark.parametrize("name", ["forward hook", "hook before a forward", "hook on all modules", "class patched"])
def test_what_is_undone_finds_the_prefixes_of_before(name: str) -> None:
    model, store = sharing()
    with entered(CHANGES[name](model)):
        assert num_found(model, store) == 0
    assert num_found(model, store) == 2


def test_settings_that_come_back_find_the_prefixes_of_before() -> None:
    model, store = sharing()
    model.train()
    assert num_found(model, store) == 0
    model.eval()
    assert num_found(model, store) == 2


def test_a_hook_that_is_put_on_again_may_hold_something_else() -> None:
    class Steering:
        vector = 1.0

        def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
            return output + self.vector

    model, steering = tiny_model(attention="sdpa"), Steering()
    mlp = model.model.layers[0].mlp
    model, store = sharing(model)
    for steering.vector in (1.0, -3.0):
        with mlp.register_forward_hook(steering):
            assert num_found(model, store) == 0
            assert num_found(model, store) == 2


def test_hooks_that_transformers_reads_outputs_with_change_nothing() -> None:
    model, store = sharing()
    generate(model, INPUTS, output_hidden_states=True, return_dict_in_generate=True)
    assert any(module._forward_hooks for module in model.modules())
    assert num_found(model, store) == 2


def test_what_never_reaches_a_forward_changes_nothing() -> None:
    model, store = sharing()
    model.generation_config.temperature = 0.5
    model.generation_config = type(model.generation_config)(eos_token_id=None, pad_token_id=0)
    model.config.use_cache = not model.config.use_cache
    model.requires_grad_(False)
    for old, new in (("gradient_checkpointing_enable", "activation_checkpointing_enable"),
                     ("gradient_checkpointing_disable", "activation_checkpointing_disable")):  # fmt: skip
        getattr(model, new, getattr(model, old))()
    with_gradients(model.requires_grad_(True))
    model.zero_grad()
    keys_of(model).register_full_backward_hook(lambda *_: None)
    assert num_found(model, store) == 2


# Optimizers.


def test_a_step_on_other_weights_changes_nothing() -> None:
    model, store = sharing()
    student = with_gradients(tiny_model(seed=1))
    torch.optim.AdamW(student.parameters(), lr=0.05, fused=True).step()
    assert num_found(model, store) == 2


def unsampled_gradient(weight: nn.Parameter) -> None:
    """Let a step move one element that no sample meets."""
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 1] = 50.0


def test_a_step_that_no_sample_shows_is_seen() -> None:
    model, store = sharing()
    unsampled_gradient(keys_of(model).weight)
    torch.optim.SGD([keys_of(model).weight], lr=0.5, fused=True).step()
    assert num_found(model, store) == 0


def test_a_step_that_breaks_off_is_seen() -> None:
    class Broken(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            self.param_groups[0]["params"][0].data[0, 1] += 50
            raise RuntimeError("device gone")

    model, store = sharing()
    with pytest.raises(RuntimeError, match="device gone"):
        Broken([keys_of(model).weight], {}).step()
    assert num_found(model, store) == 0


def test_a_step_on_weights_that_were_put_aside_is_seen_when_they_come_back() -> None:
    model, store = sharing()
    aside, module = keys_of(model).weight, keys_of(model)
    module.weight = nn.Parameter(aside.detach() * 2)
    assert num_found(model, store) == 0
    unsampled_gradient(aside)
    torch.optim.SGD([aside], lr=0.5, fused=True).step()
    module.weight = aside
    assert num_found(model, store) == 0


def test_a_compiled_step_is_seen() -> None:
    model = with_gradients(tiny_model())
    identity = ModelIdentity(model)
    step = torch.compile(torch.optim.SGD(model.parameters(), lr=0.5, fused=True).step, backend="eager")
    states = {identity.state()}
    for _ in range(3):
        step()
        states.add(identity.state())
    assert len(states) == 4


def test_hooks_on_optimizers_are_installed_once() -> None:
    from torch.optim.optimizer import _global_optimizer_post_hooks as hooks

    ModelIdentity(tiny_model())
    before = len(hooks)
    for _ in range(3):
        ModelIdentity(tiny_model())
    assert len(hooks) == before


# What samples see.


@pytest.mark.parametrize("layout", ["dense", "transposed", "strided", "offset"])
@pytest.mark.parametrize("place", [(0, 1), (31, 2), (17, 30)])
def test_scaling_a_weight_that_is_zero_nearly_everywhere_is_seen(layout: str, place: tuple[int, int]) -> None:
    model, sparse = tiny_model(), torch.zeros(32, 32)
    sparse[place] = 0.5
    weights = {
        "dense": sparse,
        "transposed": sparse.t().contiguous().t(),
        "strided": torch.stack([sparse, torch.ones_like(sparse)], dim=2)[..., 0],
        "offset": torch.cat([torch.ones(3, 32), sparse])[3:],
    }
    weight = model.model.layers[1].self_attn.q_proj.weight
    weight.data = weights[layout]
    identity = ModelIdentity(model)
    states = {identity.state(), identity.state()}
    assert len(states) == 1
    for _ in range(2):
        weight.data.mul_(3)
        states.add(identity.state())
    assert len(states) == 3


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn])
def test_writes_to_every_dtype_are_seen(dtype: torch.dtype) -> None:
    model = tiny_model()
    model.extra = nn.Parameter(torch.arange(1, 33).reshape(4, 8).to(dtype), requires_grad=False)
    identity = ModelIdentity(model)
    before = identity.state()
    assert identity.state() == before
    model.extra.data.view(torch.uint8).add_(1)
    assert identity.state() != before


@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0), (1, 1), (70,), (2, 3, 4, 5)])
def test_tensors_of_every_shape_are_read(shape: tuple[int, ...]) -> None:
    model = tiny_model()
    model.register_buffer("extra", torch.ones(shape))
    model.listed = [{"extra": torch.ones(shape)}]
    identity = ModelIdentity(model)
    for tensor in (model.extra, model.listed[0]["extra"]):
        before = identity.state()
        assert identity.state() == before
        tensor.data.mul_(2)
        assert (identity.state() == before) == (not tensor.numel())


def test_weights_made_in_inference_mode_are_read() -> None:
    with torch.inference_mode():
        model, store = sharing()
        keys_of(model).weight.mul_(1.5)
        assert num_found(model, store) == 0
    assert num_found(model, store) == 2


def test_parts_of_wrapped_weights_are_read() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model = tiny_model()
    parts = torch.ones(4, 4), torch.ones(4, 4)
    model.extra = nn.Parameter(TwoTensor(*parts))
    identity = ModelIdentity(model)
    states = {identity.state(), identity.state()}
    for part in parts:
        part.data.mul_(2)
        states.add(identity.state())
    assert len(states) == 3


# What identities must not do.


@pytest.mark.parametrize(
    "make",
    [lambda module, n: MethodType(lambda self, x: n * x, module), lambda module, n: 1.5 * n, lambda module, n: {n: n}],
    ids=["method", "number", "dict"],
)
def test_what_took_the_address_of_something_else_is_told_from_it(make: Callable[[nn.Module, int], object]) -> None:
    model = tiny_model()
    identity, module = ModelIdentity(model), keys_of(model)
    states = set()
    for n in range(20):  # each goes where the one before was
        module.forward = make(module, n)
        states.add(identity.state())
        del module.forward
    assert len(states) == 20


def test_a_store_holds_no_part_of_its_model() -> None:
    model, store = sharing()
    keys_of(model).forward = MethodType(nn.Linear.forward, keys_of(model))
    model.listed = [model.model.layers[0], {"tensor": torch.ones(3)}]
    store.match_length(SYSTEM)
    held = [weakref.ref(each) for each in (model, model.model.layers[0], keys_of(model).weight)]
    replaced = weakref.ref(model.lm_head.weight)
    model.lm_head.weight = nn.Parameter(torch.zeros_like(model.lm_head.weight))
    gc.collect()
    assert replaced() is None
    del model
    gc.collect()
    assert [each() for each in held] == [None] * 3
    with pytest.raises(CacheStateError, match="gone"):
        store.match_length(SYSTEM)


def test_an_attention_registered_anew_under_its_name_is_another() -> None:
    model = tiny_model(attention="sdpa")
    identity = ModelIdentity(model)
    states = set()
    for sign in (1, -1):
        AttentionInterface.register("renewed", lambda module, query, *args, sign=sign, **kwargs: sign * query)
        model.config._attn_implementation = "renewed"
        states |= {identity.state(), identity.state()}
    assert len(states) == 2


# Adapters.


def adapted() -> tuple[PreTrainedModel, PrefixStore]:
    return sharing(adapt(tiny_model(attention="sdpa"), "first", "second").eval())


def each(change: Callable[[LoraLinear], object]) -> Callable[[PreTrainedModel], None]:
    def to_all(model: PreTrainedModel) -> None:
        for layer in adapters_of(model):
            change(layer)

    return to_all


def _renamed(layer: LoraLinear) -> None:
    layer.lora_A["third"] = layer.lora_A.pop("second")


ADAPTERS: dict[str, Callable[[PreTrainedModel], None]] = {
    "switched": each(lambda layer: setattr(layer, "_active_adapter", ["second"])),
    "switched in place": each(lambda layer: layer._active_adapter.__setitem__(0, "second")),
    "both": each(lambda layer: layer._active_adapter.append("second")),
    "disabled": each(lambda layer: setattr(layer, "_disable_adapters", True)),
    "scaled": each(lambda layer: layer.scaling.__setitem__("first", -1.0)),
    "scaled further": each(lambda layer: layer.scaling.__setitem__("first", -2.0)),
    "merged": each(LoraLinear.merge),
    "swapped for another's weights": each(lambda layer: layer.lora_B["first"].weight.data.copy_(torch.ones(1))),
    "deleted": each(lambda layer: layer.lora_A.__delitem__("first")),
    "renamed": each(_renamed),
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_that_changes_makes_prefixes_unknown(name: str) -> None:
    model, store = adapted()
    if name == "scaled further":
        ADAPTERS["scaled"](model)
        assert num_found(model, store) == 0
    ADAPTERS[name](model)
    assert num_found(model, store) == 0
    assert num_found(model, store) == 2


def test_adapters_that_take_turns_find_their_own_prefixes() -> None:
    model, store = adapted()
    for turn_idx in range(2):
        for name in ("second", "first"):
            each(lambda layer, name=name: setattr(layer, "_active_adapter", [name]))(model)
            assert num_found(model, store) == (2 if turn_idx or name == "first" else 0)


def test_rows_with_adapters_of_their_own_share_nothing() -> None:
    model, store = adapted()
    same = batch(SYSTEM, SYSTEM)
    with by_row(model, "first", "second"):
        rows = store.stats().rows
        assert num_found(model, store, same) == 0
        assert num_found(model, store, same) == 0
        assert store.stats().rows == rows
        with pytest.raises(CacheStateError, match="adapters of their own"):
            store.cache(**same)
    assert num_found(model, store) == 2


def test_a_soft_prompt_shares_nothing() -> None:
    """What PEFT's prompt tuning does: the first forward gets embeddings of more than the tokens."""
    model, store = sharing()
    own, soft = model.prepare_inputs_for_generation, torch.ones(2, 3, 32)

    def prepare(input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        inputs = own(input_ids, **kwargs)
        columns = inputs["attention_mask"].shape[1] + 3
        inputs["attention_mask"] = torch.cat([torch.ones(2, 3, dtype=torch.long), inputs["attention_mask"]], dim=1)
        first = not kwargs[CACHE_KEYWORD].get_seq_length()
        if first:
            embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
            inputs["inputs_embeds"] = torch.cat([soft, embeds], dim=1)
        inputs["position_ids"] = torch.arange(0 if first else columns - 1, columns)[None].expand(2, -1)
        return inputs

    model.prepare_inputs_for_generation = prepare
    rows = store.stats().rows
    for _ in range(2):
        assert num_found(model, store) == 0
    assert store.stats().rows == rows
    model.prepare_inputs_for_generation = own  # as PEFT leaves it
    assert num_found(model, store) == 2


# Changes between making a cache and keeping what it holds.


@pytest.mark.parametrize("change", ["fused AdamW", "forward hook", "data scaled", "epsilon set"])
def test_a_cache_made_before_a_change_is_not_read_after_it(change: str) -> None:
    model = tiny_model(attention="sdpa")
    store = PrefixStore(model)
    turn(store, model, INPUTS)
    cache = store.cache(**INPUTS)
    assert cache.num_shared > 0
    with entered(CHANGES[change](model)):
        with pytest.raises(CacheStateError, match="the model changed"):
            generate(model, INPUTS, cache)
        del cache
        store.check_integrity()
        expected = generate(model, INPUTS, DynamicCache(config=model.config))
        assert torch.equal(turn(store, model, INPUTS), expected)


@pytest.mark.parametrize("change", ["fused AdamW", "data scaled", "epsilon set"])
def test_what_was_computed_before_a_change_is_not_kept_after_it(change: str) -> None:
    model = tiny_model(attention="sdpa")
    store = PrefixStore(model)
    cache = store.cache(**INPUTS)
    output = generate(model, INPUTS, cache)
    blocks = store.stats().num_blocks
    CHANGES[change](model)
    with pytest.raises(CacheStateError, match="the model changed"):
        store.commit(cache, output)
    assert store.stats().num_blocks == blocks
    store.check_integrity()


def test_a_model_that_changes_while_it_generates_keeps_nothing() -> None:
    class Scaling(BaseStreamer):
        def put(self, value: Tensor) -> None:
            keys_of(model).weight.data.mul_(1.01)

        def end(self) -> None:
            """Nothing to do."""

    model = hf_kvopt.enable(tiny_model(), prefix_sharing=True)
    store = hf_kvopt.prefix_store(model)
    generate(model, batch(SYSTEM), streamer=Scaling())
    assert store.stats().num_blocks == 0
    store.check_integrity()


# Weights that are elsewhere.


@pytest.mark.parametrize("together", [[], ["LlamaDecoderLayer"]], ids=["one by one", "a layer at once"])
def test_an_offloaded_model_goes_on_sharing_until_its_weights_change(together: list[str]) -> None:
    model = tiny_model(attention="sdpa")
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    cpu_offload(model, torch.device("cpu"), state_dict=weights, preload_module_classes=together)
    store = PrefixStore(model)
    for is_known in (False, True):
        hits = store.stats().hits
        expected = generate(model, INPUTS, DynamicCache(config=model.config))
        assert torch.equal(turn(store, model, INPUTS), expected)
        assert store.stats().hits - hits == 2 * is_known
    weights["model.layers.0.self_attn.k_proj.weight"].data.mul_(1.5)
    hits = store.stats().hits
    expected = generate(model, INPUTS, DynamicCache(config=model.config))
    assert torch.equal(turn(store, model, INPUTS), expected)
    assert store.stats().hits == hits


# What a look costs, by counted work.


class Operations(TorchDispatchMode):
    """Counts operations, and the elements that are read by those that are no view."""

    def __init__(self) -> None:
        super().__init__()
        self.num_operations = self.num_read = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.num_operations += 1
        if not func.is_view:
            self.num_read += out.numel()
        return out


@pytest.mark.parametrize("num_layers", [2, 24])
def test_a_look_at_an_unchanged_model_reads_a_few_values_of_each_tensor(num_layers: int) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=128, num_hidden_layers=num_layers, **shape))
    identity = ModelIdentity(model)
    first = identity.state()
    described = identity._attributes.num_described
    num_tensors = len(list(model.parameters())) + len(list(model.buffers()))
    with Operations() as counted:
        assert identity.state() == first
    assert identity._attributes.num_described == described
    # A view of each, and for their one dtype: put together, brought over, seen as bytes, compared with zero.
    assert counted.num_operations <= num_tensors + 16
    assert counted.num_read <= 3 * 64 * num_tensors


def test_a_module_that_changed_is_described_again_and_no_other() -> None:
    model = tiny_model()
    identity = ModelIdentity(model)
    identity.state()
    described = identity._attributes.num_described
    model.model.layers[1].input_layernorm.variance_epsilon = 0.5
    identity.state()
    assert identity._attributes.num_described == described + 1


def test_states_of_the_past_leave_nothing_behind() -> None:
    model = tiny_model()
    store = PrefixStore(model, max_tokens=16 * 12)
    for step in range(30):
        keys_of(model).weight.data.mul_(1.01)
        turn(store, model, batch(text(40, seed=step)))
    assert len(store.index.roots) <= 12
