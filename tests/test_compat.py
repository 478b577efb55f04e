"""Names of transformers: found by feature, checked once, and missing ones refused before anything runs."""

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, cache_utils, masking_utils, modeling_utils
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin

from hf_kvopt import CACHE_KEYWORD, PagedCache, PrefixStore, UnsupportedModel, compat, enable, speculative
from hf_kvopt.compat import attention, models, names
from tests.helpers import eager_tokens, prompt, tiny_model

pytestmark = pytest.mark.smoke


@pytest.fixture(autouse=True)
def fresh_check() -> Iterator[None]:
    """Let every test look for the names anew."""
    compat.check.cache_clear()
    yield
    compat.check.cache_clear()


def test_the_cache_is_called_what_transformers_outputs_call_it():
    model = tiny_model()
    out = model(**prompt(5), use_cache=True)
    assert isinstance(out[CACHE_KEYWORD], DynamicCache)
    assert compat.cache_keyword(model) == CACHE_KEYWORD


def test_this_version_has_every_name():
    compat.check()


@pytest.mark.parametrize("name", [compat.MAKE_CACHE, compat.PREFILL, "_supports_default_dynamic_cache"])
@pytest.mark.parametrize("use", ["enable", "speculative", "store"])
def test_a_missing_method_is_refused_with_version_and_name(name, use, monkeypatch):
    model = tiny_model()
    monkeypatch.delattr(GenerationMixin, name)
    uses = {
        "enable": lambda: enable(model),
        "speculative": lambda: speculative("prompt_lookup")(model, prompt(5)["input_ids"], [], [], GenerationConfig()),
        "store": lambda: PrefixStore(model),
    }
    with pytest.raises(UnsupportedModel, match=rf"transformers {compat.VERSION} has no GenerationMixin.{name}"):
        uses[use]()


def test_a_missing_function_is_refused_where_it_is_used(monkeypatch):
    monkeypatch.delattr(cache_utils, "get_layer_types_and_kwargs")
    monkeypatch.setattr(models, "_layer_types_and_kwargs", names.find(cache_utils, "get_layer_types_and_kwargs"))
    with pytest.raises(UnsupportedModel, match=r"cache_utils\.get_layer_types_and_kwargs"):
        PagedCache(tiny_model().config)
    with pytest.raises(UnsupportedModel, match=r"cache_utils\.get_layer_types_and_kwargs"):
        compat.check()


@pytest.mark.parametrize(
    ("held", "name"), [("ATTENTIONS", "ALL_ATTENTION_FUNCTIONS"), ("MASKS", "ALL_MASK_ATTENTION_FUNCTIONS")]
)
def test_a_missing_registry_is_refused_at_registration_and_at_the_first_use(monkeypatch, held, name):
    module = modeling_utils if held == "ATTENTIONS" else masking_utils
    monkeypatch.delattr(module, name)
    monkeypatch.setattr(attention, held, names.find(module, name))
    for use in (lambda: attention.register_attention("another", None, None), compat.check):
        with pytest.raises(UnsupportedModel, match=rf"transformers {compat.VERSION} has no .*{name}"):
            use()


def test_a_registry_that_chooses_otherwise_is_refused(monkeypatch):
    monkeypatch.setattr(attention, "ATTENTIONS", {})
    with pytest.raises(UnsupportedModel, match=r"AttentionInterface\.get_interface"):
        compat.check()


def test_a_method_with_other_arguments_is_refused(monkeypatch):
    def other(self, config, kwargs):  # what a later version might make of it
        raise AssertionError("never called")

    monkeypatch.setattr(GenerationMixin, compat.MAKE_CACHE, other)
    with pytest.raises(UnsupportedModel, match=compat.MAKE_CACHE):
        enable(tiny_model())


def test_a_version_that_does_not_mark_the_callers_cache_is_refused(monkeypatch):
    def forgetful(self, generation_config, model_kwargs, *args):
        """Accept any cache and leave no mark on it."""

    monkeypatch.setattr(GenerationMixin, compat.MAKE_CACHE, forgetful)
    with pytest.raises(UnsupportedModel, match="_is_user_defined"):
        enable(tiny_model())


def test_a_newer_minor_version_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(names, "VERSION", Version("5.99.0"))
    with caplog.at_level(logging.WARNING, logger="hf_kvopt"):
        enable(tiny_model())
        enable(tiny_model())
    assert [record.getMessage().split(" is newer")[0] for record in caplog.records] == ["transformers 5.99.0"]


def test_a_tested_version_is_not_warned_of(caplog):
    with caplog.at_level(logging.WARNING, logger="hf_kvopt"):
        compat.check()
    assert not caplog.records


class RemoteConfig(PreTrainedConfig):
    """Stands for the config of a model whose code is on the Hub."""

    model_type = "remote_code_of_a_test"


class RemoteModel(PreTrainedModel):
    """Stands for remote code that was written before 5.24 renamed the argument."""

    config_class = RemoteConfig

    def __init__(self, config: RemoteConfig) -> None:
        super().__init__(config)
        self.layer = nn.Linear(1, 1)

    def forward(self, input_ids: torch.Tensor, past_key_values: Any = None) -> None:
        """Take a cache by its older name."""


class WithoutCache(RemoteModel):
    """Stands for a model that keeps no past."""

    def forward(self, input_ids: torch.Tensor) -> None:
        """Take no cache."""


def test_remote_code_is_handed_a_cache_by_the_name_that_it_takes():
    assert compat.cache_keyword(RemoteModel(RemoteConfig())) == "past_key_values"


def test_a_forward_without_a_cache_is_named():
    with pytest.raises(UnsupportedModel, match="WithoutCache takes no cache"):
        compat.cache_keyword(WithoutCache(RemoteConfig()))


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_the_older_name_is_taken_by_every_version():
    got = tiny_model().generate(**prompt(9, 6), past_key_values=PagedCache(), max_new_tokens=12, do_sample=False)
    assert torch.equal(got, eager_tokens("full", 9, 6))


@pytest.mark.filterwarnings("ignore:.*past_key_values:FutureWarning")
def test_the_older_name_reaches_speculation():
    model = tiny_model()
    got = model.generate(
        **prompt(9, 6), past_key_values=PagedCache(), custom_generate=speculative("prompt_lookup", fallback=False),
        max_new_tokens=12, do_sample=False,
    )  # fmt: skip
    assert torch.equal(got, eager_tokens("full", 9, 6))


def test_a_prompt_without_padding_still_has_its_columns():
    mask = torch.ones(2, 7, dtype=torch.long)
    assert compat.prompt_columns(GenerationConfig(), mask) == 7
    config = GenerationConfig()
    config._mask_length = 5  # what generate() leaves where it drops an all-ones mask
    assert compat.prompt_columns(config, None) == 5
    assert compat.prompt_columns(GenerationConfig(), None) == -1
