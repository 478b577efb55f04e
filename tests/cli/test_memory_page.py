"""Every line that `memory` prints agrees with its report, for models that people ask about."""

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from hf_kvopt.__main__ import main
from hf_kvopt.plan import MemoryReport, devices, memory
from tests.plan.pages import HERE, Rule, hold, near, number, pretend, require_plain_figures, same_bytes, size_of
from tests.plan.published import PUBLISHED

QUESTIONS: list[dict[str, Any]] = [
    {"context": "4096"},
    {"context": "32k", "batch": 8},
    {"context": "1000", "batch": 3, "format": "int8"},
    {"context": "8k", "batch": 4, "max_tokens": "64k", "format": "k8v4", "block_size": 32},
    {"context": "300", "batch": 1, "cache": "dynamic"},
]


@pytest.mark.parametrize("device", ["H200", "RTX4090", "cpu"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_line_of_a_memory_page_is_so(
    name: str, device: str, capsys: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(PUBLISHED[name]))
    for question in QUESTIONS:
        if "kv_lora_rank" in PUBLISHED[name] and question.get("format") == "k8v4":
            question = question | {"format": "int8/int4"}  # latents have no blocks to seal
        words = ["memory", str(path), "--device", device]
        for option, value in question.items():
            words += ["--" + option.replace("_", "-"), str(value)]
        with contextlib.suppress(SystemExit):
            main(words)
        printed = capsys.readouterr()
        report = memory(str(path), device=device, **question)
        hold_page(printed.out, report, device)
        room = report.capacity
        assert room is not None
        # Weights beyond the budget are told on the page as well as in one line of error.
        assert bool(printed.err) == (room.kv_budget_bytes <= 0)
        if printed.err:
            found = re.search(
                r"budget of (.+?) is impossible: the weights alone take (.+?);.* --budget (\d+)GiB", printed.err
            )
            assert same_bytes(found[1], room.budget_bytes)
            assert same_bytes(found[2], report.weight_bytes)
            assert int(found[3]) * 2**30 > report.weight_bytes


def hold_page(page: str, report: MemoryReport, device: str) -> None:
    require_plain_figures(page)
    title, layers, totals, capacity, *notes = page.strip().split("\n\n")
    model, cache = title.splitlines()
    assert model.endswith(f": {report.model_type}, {report.attention}")
    blocks = f", blocks of {report.block_size}" if report.block_size else ""
    counted = f"batch {report.batch} x {report.context:,} tokens"
    assert cache == f"{report.cache} cache, {report.format}{blocks}, {report.dtype}; {counted}"
    hold_layers(layers.splitlines()[2:], report)
    known = total_rules(report) + capacity_rules(report, device)
    for line in (totals + "\n" + capacity).splitlines():
        hold(re.sub(r"\s{2,}", " | ", line.strip()), known)
    for note in [line for block in notes for line in block.splitlines()]:
        assert note.removeprefix("note: ") in report.notes


def hold_layers(lines: list[str], report: MemoryReport) -> None:
    """Groups of layers: how many there are, and what each keeps of a token."""
    total = seen = 0
    for line in lines:
        where, stores, keys, values, format, size = re.split(r"\s{2,}", line.strip())
        count = int(re.search(r"\((\d+)\)", where)[1]) if "(" in where else len(where.split(", "))
        first = report.layers[int(re.match(r"\d+", where)[0])]
        assert number(size) == first.bytes_per_token
        assert format == first.format
        assert (keys, values) == tuple(f"{heads} x {dim}" for heads, dim in (first.key_shape, first.value_shape))
        assert stores == first.kind + (f", window {first.window:,}" if first.window else "")
        assert count == sum(layer == first for layer in report.layers)
        seen += count
        total += count * first.bytes_per_token * (first.window is None)
    assert seen == len(report.layers)
    assert total == report.bytes_per_token


def both(text: str, size: float) -> bool:
    """Whether `1.0 GiB (1.07 GB)` says one size in both units."""
    found = re.fullmatch(r"(.+) \(([\d,.]+) GB\)", text)
    return found is not None and same_bytes(found[1], size) and near(found[2], size / 1e9)


def total_rules(r: MemoryReport) -> list[Rule]:
    def sums_up(text: str) -> bool:
        assert r.weight_bytes is not None
        assert r.total_bytes == r.weight_bytes + r.used_bytes + r.stock_bytes + r.cross_used_bytes
        return both(text, r.total_bytes)

    def ahead(text: str) -> bool:
        assert r.cache == "paged"
        return both(text, r.reserved_bytes) and r.reserved_bytes > r.used_bytes

    return [
        Rule("per token of a row, all layers that keep it | {num} B", lambda n: number(n) == r.bytes_per_token),
        Rule("of which scales | {num} B", lambda n: number(n) == r.scale_bytes_per_token > 0),
        Rule("KV cache | {any}", lambda text: both(text, r.used_bytes)),
        Rule("of which block slack | {gib}", lambda size: same_bytes(size, r.used_bytes - r.content_bytes)),
        Rule("reserved as pools grow ahead | {any}", ahead),
        Rule(
            "weights, {num} M parameters | {any}",
            lambda n, text: near(n, r.num_parameters / 1e6) and both(text, r.weight_bytes),
        ),
        Rule("weights + KV | {any}", sums_up),
    ]


def capacity_rules(r: MemoryReport, device: str) -> list[Rule]:
    room, place = r.capacity, HERE if device == "cpu" else devices.DEVICES[device]
    assert room is not None

    def budget(share: str, name: str, text: str) -> bool:
        return float(share) == 0.9 and name == device and both(text, int(0.9 * place.memory_bytes))

    def does_not_fit(batch: str, context: str, text: str, lacking: str) -> bool:
        left = max(0, room.kv_budget_bytes)
        assert size_of(lacking) > 0
        return fits(batch, context, text, False) and same_bytes(lacking, room.needed_bytes - left)

    def fits(batch: str, context: str, text: str, so: bool = True) -> bool:
        assert room.needed_bytes == r.reserved_bytes + r.stock_bytes + r.cross_reserved_bytes
        assert so == (r.weight_bytes + room.needed_bytes <= room.budget_bytes)
        return both(text, room.needed_bytes) and (int(batch), number(context)) == (r.batch, r.context)

    limit = r.max_positions
    largest = {
        f"largest context at batch {r.batch}": (room.max_context, room.capped_context, "token"),
        f"largest batch at {r.context:,} tokens": (room.max_batch, room.capped_batch, "row"),
    }

    def most(name: str, as_asked: str, capped: str | None, beyond: str | None) -> bool:
        asked, alone, unit = largest[name]
        assert count_of(as_asked, unit) == asked
        assert alone == (asked if capped is None else count_of(capped, unit)) >= asked
        assert bool(beyond) == (unit == "token" and limit is not None and alone > limit)
        return beyond is None or number(beyond) == limit

    return [
        Rule("budget, {num} of {word} | {any}", budget),
        Rule("left for KV | {num} {any}", lambda *parts: both(" ".join(parts), room.kv_budget_bytes)),
        Rule(
            "left for KV | none: the weights alone take {gib} more than the budget",
            lambda size: same_bytes(size, r.weight_bytes - room.budget_bytes),
        ),
        Rule("batch {num} x {num} tokens | {any}: fits", fits),
        Rule("batch {num} x {num} tokens | {any}: does not fit: {gib} too much", does_not_fit),
        Rule("{largest} | {count}{capped}{beyond}", most),
    ]


def count_of(text: str, unit: str) -> int:
    """A printed count of rows or tokens, one of them in the singular."""
    if text == "none":
        return 0
    found = re.fullmatch(rf"([\d,]+) {unit}(s?)", text)
    assert found is not None
    assert bool(found[2]) == (found[1] != "1")
    return int(number(found[1]))
