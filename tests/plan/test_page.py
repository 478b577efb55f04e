"""Every printed sentence of `plan` agrees with every printed figure, for models that people ask about."""

import contextlib
import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hf_kvopt.__main__ import main
from hf_kvopt.plan import Plan, devices, plan, show_bytes
from hf_kvopt.plan.steps import EAGER_CPU_SECONDS_PER_LAYER, EAGER_GPU_SECONDS_PER_LAYER
from tests.plan.pages import (
    HERE,
    Rule,
    hold,
    near,
    number,
    pretend,
    require_plain_figures,
    same_bytes,
    size_of,
    table_of,
)
from tests.plan.plan_rules import Facts, rules
from tests.plan.published import PUBLISHED

QUESTIONS = [
    {"context": "4k", "batch": 1, "goal": "latency", "workload": "chat"},
    {"context": "4k", "batch": 1, "goal": "latency", "workload": "agent", "head": True},
    {"context": "32k", "batch": 8, "goal": "throughput", "workload": "agent"},
    {"context": "64k", "batch": 4, "goal": "latency", "workload": "document"},
    {"context": "2k", "batch": 64, "goal": "throughput", "workload": "batch"},
    {"context": "1000", "batch": 3, "goal": "latency", "workload": "code"},
    {"context": "300", "batch": 32, "goal": "latency", "workload": "document"},
    {"context": "128k", "batch": 2, "goal": "latency", "workload": "batch", "head": True},
]


@pytest.fixture(autouse=True)
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)


def page_of(fields: dict[str, Any], question: dict[str, Any], capsys: Any, tmp_path: Path) -> tuple[str, str]:
    """Return what the command prints on its two streams."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(fields))
    words = ["plan", str(path), f"--{question['goal']}", *["--head"] * bool(question.get("head"))]
    for name in ("device", "context", "batch", "workload"):
        words += [f"--{name}", str(question[name])]
    with contextlib.suppress(SystemExit):
        main(words)
    printed = capsys.readouterr()
    return printed.out, printed.err


# Every model on a large GPU, a small one and this machine; and GPUs that differ otherwise.
PLACES = [
    *((name, device) for name in PUBLISHED for device in ("H200", "RTX4090", "cpu")),
    ("Llama-3.1-8B", "A100-40"),
    ("Llama-3.1-8B", "MI300X"),
    ("DeepSeek-V3", "B200"),
    ("SmolLM2-135M", "T4"),
]


@pytest.mark.parametrize(("name", "device"), PLACES)
def test_every_sentence_of_a_plan_is_so(name: str, device: str, capsys: Any, tmp_path: Path) -> None:
    for question in QUESTIONS:
        asked = {"device": device, **question}
        page, error = page_of(PUBLISHED[name], asked, capsys, tmp_path)
        if error:
            hold_error(error, PUBLISHED[name], device)
            continue
        made = plan(copy.deepcopy(PUBLISHED[name]), **asked)
        hold_page(page, Facts(PUBLISHED[name], made, bool(question.get("head"))))


def hold_error(error: str, fields: dict[str, Any], device: str) -> None:
    """Check the one-line error of a plan that fits nowhere: it states what is lacking."""
    found = re.search(
        r"budget of (.+?)( a device)? is impossible: weights take (.+?), and with the smallest cache (.+?) are needed, "
        r"more than (?:(\d+) of )?(.+?) holds?; expected for example budget='(\d+)GiB', a smaller model, or a shorter",
        error,
    )
    assert found is not None, error
    place = HERE if device == "cpu" else devices.DEVICES[device]
    budget, each, weights, needed, many, name, example = found.groups()
    assert same_bytes(budget, int(place.memory_bytes * 0.9))
    assert name == place.name
    assert (int(many or 1), bool(each)) == ((8, True) if place.is_gpu else (1, False))
    assert size_of(weights) <= size_of(needed)
    count = int(many or 1)
    # Undivided parts on each device, and layers that cannot be split, leave some of the sum unused.
    assert size_of(needed) > 0.7 * count * place.memory_bytes * 0.9
    assert int(example) * 1024**3 * count > size_of(needed)


def hold_page(page: str, facts: Facts) -> None:
    """Check each line of a page against the plan."""
    require_plain_figures(page)
    blocks = page.strip().split("\n\n")
    known = rules(facts)
    title, *rest = blocks
    hold_title(title, facts.made)
    topics = [block for block in rest if re.match(r"[a-z ]+: ", block)]
    assert len(topics) == len(known)
    for block in topics:
        lines = [line.strip() for line in block.splitlines()]
        topic = lines[0].partition(": ")[0]
        for line in lines:
            hold(line, known[topic])
        assert [line.split()[0] for line in lines[1:3]] == ["because", "gain:"]
    hold_table(next(block for block in rest if block.startswith("predicted")), facts.made)
    assumed = next(block for block in rest if block.startswith("Assumed:"))
    for line in assumed.splitlines()[1:]:
        hold(line.strip(), assumption_rules(facts))
    hold_default(rest, facts.made)
    hold_code(facts.made, page)


def hold_title(title: str, made: Plan) -> None:
    many = f" x {made.num_devices}" if made.num_devices > 1 else ""
    said = f": {made.model_type}, {made.dtype}, on {made.device.name}{many}; {made.workload} for {made.goal}, batch "
    assert title.endswith(f"{said}{made.batch} x {made.context:,} tokens")


def hold_table(block: str, made: Plan) -> None:
    p, rows = made.predicted, table_of(block.splitlines())
    assert rows.pop("weights") == [show_bytes(p.weight_bytes)] * 2
    assert rows.pop("KV cache of this batch") == [show_bytes(p.kv_bytes), show_bytes(p.default_kv_bytes)]
    assert rows.pop("KV cache at most") == [show_bytes(p.most_kv_bytes), show_bytes(p.default_kv_bytes)]
    assert rows.pop("tokens a row and step") == [f"{p.accepted:g}", "1"]
    times = {
        "first token, s": (p.first_token_ms / 1e3, p.default_first_token_ms / 1e3),
        "step, ms": (p.step_ms, p.default_step_ms),
        "request, s": (p.request_s, p.default_request_s),
    }
    shown = {name: [number(text) for text in rows[name]] for name in times}
    for name, values in times.items():
        assert all(near(text, value) for text, value in zip(rows.pop(name), values, strict=True))
    speed_up, plain = rows.pop("speed-up of a request")
    assert plain == "1x"
    assert not rows
    # A request is its first token and a step for each further one, divided by the tokens of a step.
    new = int(re.search(r"max_new_tokens=(\d+)", made.code[-1])[1])
    for side, accepted in enumerate((p.accepted, 1.0)):
        total = shown["first token, s"][side] + (new - 1) * shown["step, ms"][side] / 1e3 / accepted
        assert total == pytest.approx(shown["request, s"][side], rel=0.01)
    ours, default = shown["request, s"]
    assert number(speed_up[:-1]) == pytest.approx(default / ours, rel=0.02)
    # No step, the prompt's included, takes less than its launch by the host.
    layers = made.option.is_compiled, made.device.is_gpu
    host = 1e3 * num_layers(made) * (EAGER_GPU_SECONDS_PER_LAYER if layers[1] else EAGER_CPU_SECONDS_PER_LAYER)
    assert min(p.first_token_ms, p.default_first_token_ms, p.default_step_ms) >= 0.999 * host


def num_layers(made: Plan) -> int:
    fields = next(one for one in PUBLISHED.values() if one["model_type"] == made.model_type)
    counts = {
        one.get("text_config", one)["num_hidden_layers"]
        for one in PUBLISHED.values()
        if one["model_type"] == fields["model_type"]
    }
    return min(counts)


def assumption_rules(facts: Facts) -> list[Rule]:
    made, work = facts.made, facts.work

    def requests(prompt: str, new: str, seen: str) -> bool:
        assert number(prompt) + number(new) == made.context
        assert f"max_new_tokens={int(number(new))}" in made.code[-1]
        return number(new) <= work.new_tokens and near(seen, 100 * work.seen_share)

    def beyond(limit: str, context: str) -> bool:
        most = facts.fields.get("text_config", facts.fields)["max_position_embeddings"]
        return number(limit) == most < number(context) == made.context

    def device(bandwidth: str, flops: str, unit: str, source: str) -> bool:
        unit, _, beginning = unit.partition(" (")  # a source may hold parentheses of its own
        source = f"{beginning} ({source}" if beginning else source
        rate = {"TFLOP/s": 1e12, "GFLOP/s": 1e9}[unit]
        figures = near(bandwidth, made.device.bandwidth / 1e9) and near(flops, made.device.flops / rate)
        return figures and source == made.device.source

    return [
        Rule(
            f"{made.workload}: {work.about}; {{num}} tokens of prompt, {{num}} new ones a request, {{percent}} of the "
            "prompt seen before",
            requests,
        ),
        Rule(f"{made.device.name}: {{num}} GB/s, {{num}} {{any}} ({{any}})", device),
        Rule("the model is made for {num} tokens: {num} are beyond", beyond),
        Rule(
            "times are arithmetic over bytes and operations, not measurements, and a step is one at the full context; "
            "--check measures here",
            lambda: True,
        ),
        *(Rule(note, lambda: True) for note in facts.weights.notes),
    ]


def hold_default(blocks: list[str], made: Plan) -> None:
    """Check that the page states whether the default fits, if it needs other devices than the plan."""
    needs = made.predicted.default_num_devices
    said = [block for block in blocks if block.startswith("The default's cache")]
    assert bool(said) == (needs is None or needs > made.num_devices)
    if said:
        what = f"needs {needs} such devices" if needs else "does not fit"
        assert what in said[0]
        assert not made.device.is_gpu or "devices" in said[0]


def hold_code(made: Plan, page: str) -> None:
    """Check that the lines are printed unchanged, and that `max_tokens` holds the batch in whole blocks."""
    assert page.rstrip().endswith("\n".join(f"    {line}" for line in made.code))
    p = made.predicted
    row = -(-made.context // made.block_size) * made.block_size
    assert p.max_tokens >= made.batch * row
    assert p.max_tokens % made.block_size == 0
