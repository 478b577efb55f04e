"""The Python lines of a plan work: they load, enable and generate, and the tokens are transformers' own."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_kvopt
from hf_kvopt.plan import WORKLOADS, plan
from hf_kvopt.plan.code import python_lines
from hf_kvopt.plan.layout import Layout
from hf_kvopt.plan.options import Option, holding_of
from hf_kvopt.plan.setup import Setup, set_up
from tests.plan.test_planner import CPU

ONE = Layout()
MODEL = Path(__file__).parents[2] / "evals/reference_model/model"
OPTIONS = [
    Option(format, False, shares_prefix, draft)
    for format, shares_prefix, draft in itertools.product(
        ["native", "int8", "k8v4", "int4"], [False, True], ["none", "prompt_lookup"]
    )
]


def lines_of(setup: Setup, option: Option, layout: Layout = ONE) -> list[str]:
    return python_lines(setup, option, layout, holding_of(setup, option, setup.batch))


@pytest.fixture(scope="module")
def inputs() -> dict[str, torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    return dict(tokenizer("import os\nimport sys\n\n\ndef main():\n", return_tensors="pt"))


@pytest.fixture(scope="module")
def default_tokens(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    return model.generate(**inputs, max_new_tokens=12)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda o: f"{o.format}-{'shared' * o.shares_prefix}-{o.draft}")
def test_the_lines_run_and_write_transformers_own_tokens(
    option: Option, inputs: dict[str, torch.Tensor], default_tokens: torch.Tensor
) -> None:
    setup = set_up(str(MODEL), CPU, "512", 1, "document", "latency", None, "float32")
    code = "\n".join(lines_of(setup, option)).replace("max_new_tokens=200", "max_new_tokens=12")
    scope: dict[str, Any] = {"name": str(MODEL), "inputs": inputs}
    exec(compile(code, "plan", "exec"), scope)
    assert scope["out"].shape == default_tokens.shape
    if option.format == "native":
        assert torch.equal(scope["out"], default_tokens)
    hf_kvopt.disable(scope["model"])


@pytest.mark.parametrize("goal", ["latency", "throughput"])
@pytest.mark.parametrize("workload", list(WORKLOADS))
def test_the_lines_of_whole_plans_run(
    workload: str, goal: str, inputs: dict[str, torch.Tensor], default_tokens: torch.Tensor
) -> None:
    made = plan(str(MODEL), device=CPU, context="1k", workload=workload, goal=goal, dtype="float32")
    code = re.sub(r"max_new_tokens=\d+", "max_new_tokens=12", "\n".join(made.code))
    scope: dict[str, Any] = {"name": str(MODEL), "inputs": inputs}
    exec(compile(code, "plan", "exec"), scope)
    assert made.option.format == "native"
    assert torch.equal(scope["out"], default_tokens)
    hf_kvopt.disable(scope["model"])


def test_a_compiled_plan_names_options_that_the_cache_takes() -> None:
    setup = set_up(str(MODEL), "H200", "512", 1, "batch", "latency", None, "bfloat16")
    (line,) = [x for x in lines_of(setup, Option("int8", True, False, "none")) if "enable(" in x]
    model: Any = AutoModelForCausalLM.from_pretrained(MODEL)
    exec(line, {"hf_kvopt": hf_kvopt, "model": model})
    hf_kvopt.disable(model)


def test_a_head_is_loaded_by_a_name_that_exists() -> None:
    setup = set_up(str(MODEL), CPU, "512", 1, "chat", "latency", None, "float32")
    code = "\n".join(lines_of(setup, Option("native", False, False, "head")))
    assert "hf_kvopt.speculative(hf_kvopt.DraftHead.from_pretrained(head_path))" in code
    assert callable(hf_kvopt.speculative)
    assert callable(hf_kvopt.DraftHead.from_pretrained)


def test_parallel_lines_name_what_transformers_has() -> None:
    setup = set_up(str(MODEL), CPU, "512", 1, "chat", "latency", None, "float32")
    lines = lines_of(setup, Option("native", False, False, "none"), Layout(2, True, True))
    imports = [line for line in lines if "import" in line]
    exec("\n".join(imports), {})
    assert any("DistributedConfig(tp_size=2)" in line for line in lines)
