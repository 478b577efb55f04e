"""Ways in which users change what a model computes between two prompts; each is a context that ends the change.

The weights are those of `tiny_model`, with a head that is made of other weights than the embeddings.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.prefix.prefixes import batch, text

Change = Callable[[PreTrainedModel], AbstractContextManager[Any] | None]
CHANGES: dict[str, Change] = {}
TEXT = batch(text(30, seed=3))


def change(make: Change) -> Change:
    """Name a change after its function."""
    CHANGES[make.__name__.strip("_").replace("_", " ")] = make
    return make


def keys_of(model: PreTrainedModel) -> nn.Linear:
    """The projection to the keys of the first layer."""
    return model.model.layers[0].self_attn.k_proj


def frequencies_of(model: PreTrainedModel) -> Tensor:
    """Of the rotary embedding."""
    return model.model.rotary_emb.inv_freq


def with_gradients(model: PreTrainedModel) -> PreTrainedModel:
    """Compute a loss, and its gradients."""
    model(**TEXT, labels=TEXT["input_ids"], use_cache=False).loss.backward()
    return model


# Optimizers, which are gone when the next prompt comes.


class Shrinking(torch.optim.Optimizer):
    """A user's own, which writes around torch's count of writes."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(0.5)


_OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "foreach AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "plain AdamW": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=False),
    "fused Adam": lambda p: torch.optim.Adam(p, lr=0.05, fused=True),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.5, fused=True),
    "plain SGD": lambda p: torch.optim.SGD(p, lr=0.5, foreach=False),
    "fused Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, fused=True),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=2),
    "optimizer of one's own": Shrinking,
}


def _stepped(make: Callable[[Any], torch.optim.Optimizer]) -> Change:
    def step(model: PreTrainedModel) -> None:
        with_gradients(model)
        make(model.parameters()).step(lambda: torch.tensor(1.0))

    return step


CHANGES |= {name: _stepped(make) for name, make in _OPTIMIZERS.items()}


# Writes to weights.


@change
def data_scaled(model: PreTrainedModel) -> None:
    keys_of(model).weight.data.mul_(1.5)


@change
def data_replaced(model: PreTrainedModel) -> None:
    keys_of(model).weight.data = keys_of(model).weight.data * 1.5


@change
def data_transposed_where_it_lies(model: PreTrainedModel) -> None:
    weight = model.model.layers[0].self_attn.q_proj.weight
    weight.data = weight.data.t()


@change
def copied_without_gradients(model: PreTrainedModel) -> None:
    with torch.no_grad():
        keys_of(model).weight.copy_(keys_of(model).weight.flip(0))


@change
def one_element_written(model: PreTrainedModel) -> None:
    with torch.no_grad():
        keys_of(model).weight[0, 1] += 50


@change
def one_element_replaced(model: PreTrainedModel) -> None:
    weight = keys_of(model).weight.detach().clone()
    weight[0, 1] += 50
    keys_of(model).weight.data = weight


@change
def put_into_one_vector(model: PreTrainedModel) -> None:
    vector_to_parameters(parameters_to_vector(model.parameters()) * 1.5, model.parameters())


@change
def written_through_numpy(model: PreTrainedModel) -> None:
    weight = keys_of(model).weight.detach().numpy()
    np.multiply(weight, 1.5, out=weight)


@change
def written_to_the_storage(model: PreTrainedModel) -> None:
    weight = keys_of(model).weight
    weight.untyped_storage().copy_((weight.detach() * 1.5).untyped_storage())


@change
def state_dict_copied(model: PreTrainedModel) -> None:
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()})


@change
def state_dict_assigned(model: PreTrainedModel) -> None:
    model.load_state_dict({key: value * 1.5 for key, value in model.state_dict().items()}, assign=True)


@change
def parameter_replaced(model: PreTrainedModel) -> None:
    keys_of(model).weight = nn.Parameter(keys_of(model).weight.detach() * 1.5)


@change
def tensors_swapped(model: PreTrainedModel) -> None:
    torch.utils.swap_tensors(keys_of(model).weight, nn.Parameter(keys_of(model).weight.detach().flip(0)))


@change
def tied_weight_scaled_through_its_twin(model: PreTrainedModel) -> None:
    model.lm_head.weight.data.mul_(-1)
    model.model.embed_tokens.weight.data.mul_(1.5)


@change
def quantized_in_place(model: PreTrainedModel) -> None:
    for parameter in model.parameters():
        parameter.data.mul_(4).round_().div_(4)


@change
def norm_scaled(model: PreTrainedModel) -> None:
    model.model.layers[0].input_layernorm.weight.data.mul_(-2)


# What keys depend on beside weights.


@change
def frequencies_scaled(model: PreTrainedModel) -> None:
    frequencies_of(model).data.mul_(0.5)


@change
def frequencies_replaced(model: PreTrainedModel) -> None:
    model.model.rotary_emb.inv_freq = frequencies_of(model) * 0.5


@change
def frequencies_that_are_no_buffer(model: PreTrainedModel) -> None:
    values = frequencies_of(model) * 0.5
    del model.model.rotary_emb._buffers["inv_freq"]
    model.model.rotary_emb.inv_freq = values


@change
def rotary_scale_set(model: PreTrainedModel) -> None:
    model.model.rotary_emb.attention_scaling = 0.5


@change
def epsilon_set(model: PreTrainedModel) -> None:
    model.model.layers[0].input_layernorm.variance_epsilon = 3.0


@change
def softmax_scale_set(model: PreTrainedModel) -> None:
    model.model.layers[0].self_attn.scaling *= 3


@change
def activation_replaced(model: PreTrainedModel) -> None:
    model.model.layers[0].mlp.act_fn = nn.ReLU()


@change
def module_replaced(model: PreTrainedModel) -> None:
    other = nn.Linear(keys_of(model).in_features, keys_of(model).out_features, bias=False)
    nn.init.normal_(other.weight, std=0.5)
    model.model.layers[0].self_attn.k_proj = other


@change
def layers_exchanged(model: PreTrainedModel) -> None:
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    model.model.layers[0].mlp, model.model.layers[1].mlp = second, first


@change
def class_of_a_module_changed(model: PreTrainedModel) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    keys_of(model).__class__ = Doubled


@change
def training_with_dropout(model: PreTrainedModel) -> None:
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 1.0
    model.train()


@change
def config_value_set(model: PreTrainedModel) -> None:
    # Nothing reads it in this model: a forward of another might.
    model.config.partial_rotary_factor = 0.5


@change
def nested_config_value_set(model: PreTrainedModel) -> None:
    model.config.rope_parameters["rope_theta"] = 17.0


# What is computed around modules.


@change
@contextmanager
def coarse_products(model: PreTrainedModel) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@change
@contextmanager
def class_patched(model: PreTrainedModel) -> Iterator[None]:
    kind = type(model.model.layers[0].mlp)
    forward = kind.forward
    kind.forward = lambda self, x: 2 * forward(self, x)
    try:
        yield
    finally:
        kind.forward = forward


@change
def forward_replaced(model: PreTrainedModel) -> None:
    module = keys_of(model)
    module.forward = MethodType(lambda self, x: 2 * nn.Linear.forward(self, x), module)


@change
def own_attention(model: PreTrainedModel) -> None:
    AttentionInterface.register("flipped", _flipped)
    AttentionMaskInterface.register("flipped", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("flipped")


def _flipped(module: nn.Module, query: Tensor, *args: Any, **kwargs: Any) -> Any:
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, -query, *args, **kwargs)


# Hooks.


@change
@contextmanager
def forward_hook(model: PreTrainedModel) -> Iterator[None]:
    hook = model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output + 1)
    with hook:
        yield


@change
@contextmanager
def hook_before_a_forward(model: PreTrainedModel) -> Iterator[None]:
    with keys_of(model).register_forward_pre_hook(lambda module, args: (-args[0],)):
        yield


@change
@contextmanager
def hook_with_keywords(model: PreTrainedModel) -> Iterator[None]:
    def scale(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + 1}

    with model.model.layers[0].self_attn.register_forward_pre_hook(scale, with_kwargs=True):
        yield


@change
@contextmanager
def hook_on_all_modules(model: PreTrainedModel) -> Iterator[None]:
    def add(module: nn.Module, args: Any, output: Any) -> Any:
        return output + 1 if isinstance(module, nn.Linear) else None

    with nn.modules.module.register_module_forward_hook(add):
        yield


@change
@contextmanager
def hook_on_all_modules_before(model: PreTrainedModel) -> Iterator[None]:
    def negate(module: nn.Module, args: Any) -> Any:
        return (-args[0],) if module is keys_of(model) else None

    with nn.modules.module.register_module_forward_pre_hook(negate):
        yield
