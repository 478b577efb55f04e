"""Examples in the docstrings of public names run, on the bundled model."""

import doctest
import inspect
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt
from tests.docs.pages import MODEL, as_run


def _found() -> dict[str, doctest.DocTest]:
    """Return the examples by name: of the package, of its public names, and of their methods."""
    public = {name: getattr(room, name) for room in (hf_kvopt, hf_kvopt.plan) for name in room.__all__}
    objects = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isfunction(value)}
    tests = doctest.DocTestFinder(recurse=False).find(hf_kvopt, "hf_kvopt")
    for name, value in objects.items():
        tests += doctest.DocTestFinder().find(value, name, module=inspect.getmodule(value))
    return {test.name: test for test in tests if test.examples}


EXAMPLES = _found()


@pytest.fixture
def scope() -> dict[str, Any]:
    """What a reader has: a model, its name, and a tokenized prompt."""
    name = str(MODEL)
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="hf_kvopt", dtype=torch.float32)
    model.generation_config.max_new_tokens = 8
    inputs = AutoTokenizer.from_pretrained(name)("import os\n\n\ndef read(path):\n", return_tensors="pt")
    return {"AutoModelForCausalLM": AutoModelForCausalLM, "name": name, "model": model, "inputs": inputs}


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_of_a_docstring_run(name: str, scope: dict[str, Any]) -> None:
    test = EXAMPLES[name]
    for example in test.examples:
        assert doctest.SKIP not in example.options, "an example that is not run proves nothing"
        example.source = as_run(example.source)
    test.globs = test.globs | scope
    said: list[str] = []
    result = doctest.DocTestRunner().run(test, out=said.append, clear_globs=False)
    assert result.attempted
    assert not result.failed, "".join(said)


def test_the_entrances_have_examples() -> None:
    entrances = {"hf_kvopt", "enable", "speculative", "PagedCache", "QuantizedPagedCache", "PrefixStore", "memory"}
    assert entrances <= set(EXAMPLES)
