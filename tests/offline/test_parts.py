"""Part files: nothing lost, nothing twice, whatever ends when."""

import json
from pathlib import Path
from typing import Any

import pytest

from hf_kvopt.errors import KVOptError
from hf_kvopt.offline.parts import Parts

ABOUT = {"model": "m", "rows": 4}


def line(number: int, text: str = "x") -> dict[str, Any]:
    return {"index": number, "completion": text}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in path.read_text(encoding="utf8").splitlines()]


def test_rows_are_joined_in_order_and_the_folder_goes(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Parts(output, ABOUT) as parts:
        for number in (2, 0, 3, 1):
            parts.add(line(number, "ä\n" * number))
        assert parts.done() == {0, 1, 2, 3}
        assert parts.join(4) == 0
    assert lines_of(output) == [line(number, "ä\n" * number) for number in range(4)]
    assert list(tmp_path.iterdir()) == [output]


def test_a_later_run_goes_on_with_the_rows_of_an_earlier_one(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Parts(output, ABOUT) as parts:
        parts.add(line(1))
        assert parts.join(4) == 3
    assert not output.exists()
    with Parts(output, ABOUT) as first, Parts(output, ABOUT) as second:
        assert first.done() == second.done() == {1}
        first.add(line(0))
        second.add(line(2))
        assert first.join(4) == 1
        second.add(line(3))
        assert second.join(4) == 0
    assert [row["index"] for row in lines_of(output)] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "torn", [b'{"index": 1, "completion": "x', b"\n", b'{"index": 1}', b"[1]\n", b'{"index": "1"}\n', b"\xff\n"]
)
def test_a_line_that_was_cut_off_does_not_count(tmp_path: Path, torn: bytes) -> None:
    output = tmp_path / "out.jsonl"
    with Parts(output, ABOUT) as parts:
        parts.add(line(0))
    (path,) = (tmp_path / "out.jsonl.parts").glob("*.jsonl")
    path.write_bytes(path.read_bytes() + torn)
    with Parts(output, {**ABOUT}) as parts:
        assert parts.done() == {0}
        for number in (1, 2, 3):
            parts.add(line(number))
        assert parts.join(4) == 0
    assert lines_of(output) == [line(number) for number in range(4)]


def test_a_row_that_two_processes_finished_is_there_once(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    with Parts(output, ABOUT) as first, Parts(output, ABOUT) as second:
        for parts in (first, second):
            parts.add(line(0))
        assert second.join(1) == 0
        assert first.join(1) == 0
    assert lines_of(output) == [line(0)]


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    with Parts(tmp_path / "out.jsonl", ABOUT) as parts:
        parts.add(line(0))
    with pytest.raises(KVOptError, match=r"got another one in .* \(rows was 4, is 5\)"):
        Parts(tmp_path / "out.jsonl", {**ABOUT, "rows": 5})


def test_a_place_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KVOptError, match="cannot write beside the output"):
        Parts(tmp_path / "file" / "out.jsonl", ABOUT)
