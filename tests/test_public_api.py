"""What `import hf_kvopt` promises."""

import importlib
import inspect
import sys
from importlib.resources import files

import pytest
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_kvopt
from hf_kvopt import errors
from hf_kvopt.attention.forward import attention_forward
from hf_kvopt.attention.mask import lazy_mask
from hf_kvopt.attention.register import register
from hf_kvopt.cli.watch import run_while_busy

# Drawn in the docstring of errors.py.
ERRORS = {
    "KVOptError": "RuntimeError",
    "OutOfBlocks": "KVOptError",
    "CacheStateError": "KVOptError",
    "UnsupportedModel": "KVOptError",
    "UnsupportedDevice": "KVOptError",
}

pytestmark = pytest.mark.smoke


@pytest.mark.parametrize("name", hf_kvopt.__all__)
def test_every_public_name_exists_and_says_what_it_is(name):
    value = getattr(hf_kvopt, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value)
        # A dataclass without a docstring gets its signature as one.
        assert not value.__doc__.startswith(f"{name}(")


PUBLIC_CLASSES = [
    value
    for room in (hf_kvopt, hf_kvopt.plan)
    for value in (getattr(room, name) for name in room.__all__)
    if inspect.isclass(value)
]


@pytest.mark.parametrize("owner", PUBLIC_CLASSES, ids=lambda owner: owner.__name__)
def test_every_public_method_says_what_it_does(owner):
    # NamedTuples and dataclasses bring methods of their own.
    methods = {name: value for name, value in vars(owner).items() if not name.startswith("_")}
    ours = {name for name, value in methods.items() if inspect.isfunction(value) or isinstance(value, property)}
    said = {name: inspect.getdoc(getattr(owner, name)) for name in ours - {"count", "index"}}
    assert all(said.values()), [name for name, text in said.items() if not text]
    assert owner.__doc__
    assert not owner.__doc__.startswith(f"{owner.__name__}(")


@pytest.mark.parametrize(
    "name", ["PagedCache", "QuantizedPagedCache", "PrefixStore", "CacheConfig", "enable", "speculative"]
)
def test_the_entrances_say_their_errors_and_where_they_come_from(name):
    text = inspect.getdoc(getattr(hf_kvopt, name)) + inspect.getmodule(getattr(hf_kvopt, name)).__doc__
    assert "Raises:" in text
    assert "arXiv:" in text or "issue" in text or " #" in text


@pytest.mark.parametrize("name", hf_kvopt.__all__)
def test_every_public_callable_is_typed(name):
    value = getattr(hf_kvopt, name)
    if inspect.isfunction(value):
        signature = inspect.signature(value)
        assert signature.return_annotation is not inspect.Signature.empty
        assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())


def test_public_names_are_sorted_and_unique():
    # Constants first, as ruff sorts them.
    assert hf_kvopt.__all__ == sorted(set(hf_kvopt.__all__), key=lambda name: (not name.isupper(), name))


def test_the_error_tree_is_as_drawn():
    classes = {name: value for name, value in vars(errors).items() if inspect.isclass(value)}
    assert {name: value.__base__.__name__ for name, value in classes.items()} == ERRORS
    assert all(name in errors.__doc__ and name in hf_kvopt.__all__ for name in ERRORS)
    assert all(inspect.getdoc(value) for value in classes.values())


def test_importing_registers_the_attention_and_its_mask():
    assert ALL_ATTENTION_FUNCTIONS[hf_kvopt.ATTENTION_NAME] is attention_forward
    assert ALL_MASK_ATTENTION_FUNCTIONS[hf_kvopt.ATTENTION_NAME] is lazy_mask
    # Any of these in the name sends transformers down a path of its own.
    assert not any(word in hf_kvopt.ATTENTION_NAME for word in ("flash", "sdpa", "flex", "paged|"))


def test_registering_again_changes_nothing():
    before = dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)
    register()
    importlib.reload(hf_kvopt)
    assert (dict(ALL_ATTENTION_FUNCTIONS), dict(ALL_MASK_ATTENTION_FUNCTIONS)) == before


@pytest.mark.parametrize("table", [ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS], ids=["attention", "mask"])
def test_what_somebody_else_registered_stays(table):
    mine, theirs = table[hf_kvopt.ATTENTION_NAME], lambda *args, **kwargs: None
    others = {name: value for name, value in table.items() if name != hf_kvopt.ATTENTION_NAME}
    try:
        type(table).register(hf_kvopt.ATTENTION_NAME, theirs)
        register()
        assert table[hf_kvopt.ATTENTION_NAME] is theirs
    finally:
        type(table).register(hf_kvopt.ATTENTION_NAME, mine)
    assert {name: value for name, value in table.items() if name != hf_kvopt.ATTENTION_NAME} == others


def test_importing_touches_nothing_of_transformers_but_the_two_keys():
    script = """
import transformers, transformers.masking_utils as masks, transformers.modeling_utils as models
from transformers import cache_utils, generation
watched = [masks, models, cache_utils, generation.GenerationMixin, models.PreTrainedModel, cache_utils.DynamicCache]
before = [dict(vars(x)) for x in watched]
tables = masks.ALL_MASK_ATTENTION_FUNCTIONS, models.ALL_ATTENTION_FUNCTIONS
keys = [set(table) for table in tables]
import hf_kvopt
assert all(set(table) - old == {"hf_kvopt"} for table, old in zip(tables, keys))
for x, old in zip(watched, before):
    changed = {name for name, value in vars(x).items() if name not in old or old[name] is not value}
    assert changed <= {"_abc_impl", "__warningregistry__"}, (x, changed)
"""
    done = run_while_busy([sys.executable, "-c", script])
    assert done is not None
    assert done.returncode == 0, done.stderr[-2000:]


def test_types_are_shipped():
    assert (files("hf_kvopt") / "py.typed").is_file()


def test_the_version_is_the_packages():
    assert hf_kvopt.__version__.count(".") == 2
