"""Docstrings name their subject, and the examples of public names run on the bundled model."""

import ast
import doctest
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt
from tests.docs.pages import MODEL, as_run

ROOT = Path(__file__).parents[2]
# Openings that lean on the docstring above or leave out the subject; a shape stands beside its name, not in its place.
LEANING = re.compile(r"\[|(The same|Of|Like|What|Whether|As|How|Why|That|Where|Only|And|Also)\b")


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
    """Return the names that an example uses: a model, its name, and a tokenized prompt."""
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


def leaning(room: str) -> list[str]:
    """Return place and first line of the docstrings of a file or folder with a banned opening."""
    path, found = ROOT / room, []
    for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
        for node in ast.walk(ast.parse(file.read_text("utf8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                text = ast.get_docstring(node) or ""
                if LEANING.match(text):
                    found.append(f"{file.relative_to(ROOT)}:{node.body[0].lineno}: {text.splitlines()[0]}")
    return found


@pytest.mark.parametrize("folder", ["hf_kvopt", "evals"])
def test_a_docstring_names_its_subject(folder: str) -> None:
    faults = leaning(folder)
    assert not faults, "begin with a verb, or name the subject:\n" + "\n".join(faults)
