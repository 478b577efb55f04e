"""Text that a target writes for the training of its head, and the files that keep what it saw."""

import pytest
import torch

from hf_kvopt.speculation.training.data import TokenRows
from hf_kvopt.speculation.training.features import FeatureStore, Seen, look
from hf_kvopt.speculation.training.writer import Turns, Writer, _Row, openings, turns_of
from tests.helpers import VOCAB, generate, tiny_model, unpadded
from tests.speculation.test_training import tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
TEMPLATE = (
    "{% for m in messages %}{{ 'w90 ' if m['role'] == 'user' else 'w91 ' }}{{ m['content'] }} w96 {% endfor %}"
    "{% if add_generation_prompt %}w91 {% endif %}"
)
TURNS = Turns([90], [96, 91], [96, 90])


def written(writer, texts, num_chats, seed=0):
    *widths, made = list(writer.write(texts, num_chats, seed))
    return widths, *made


def test_rows_of_text_go_on_as_the_target_does():
    target, texts = tiny_model(), [list(range(3, 9)), list(range(20, 34)), list(range(40, 47))]
    widths, ids, _ = written(Writer(target, (0, 1, -1), 24, None, []), texts, 0)
    assert widths[0] == 6
    assert widths[-1] == 24
    for row, text in zip(ids, texts, strict=True):
        expected = generate(target, unpadded(torch.tensor([text])), max_new_tokens=24 - len(text))
        assert row.tolist() == expected[0].tolist()


def test_what_is_kept_of_written_rows_is_what_the_target_sees_in_them():
    target, layers = tiny_model(), (0, 1, -1)
    _, ids, seen = written(Writer(target, layers, 24, TURNS, [96]), [list(range(3, 9))], 3)
    expected = look(target, layers, ids)
    assert torch.equal(seen.best, expected.best)
    assert torch.equal(seen.top_ids[..., :4].long(), expected.top_ids[..., :4])
    torch.testing.assert_close(seen.top_p.float(), expected.top_p, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(seen.features.float(), expected.features, rtol=1e-2, atol=1e-2)


def test_conversations_open_with_the_template_and_differ():
    target = tiny_model()
    _, ids, _ = written(Writer(target, (-1,), 60, TURNS, [96]), [], 4)
    assert ids[:, 0].tolist() == [90] * 4
    assert len({tuple(row) for row in ids.tolist()}) == 4
    _, again, _ = written(Writer(target, (-1,), 60, TURNS, [96]), [], 4)
    assert torch.equal(ids, again)
    _, other, _ = written(Writer(target, (-1,), 60, TURNS, [96]), [], 4, seed=1)
    assert not torch.equal(ids, other)


def test_a_turn_that_ends_is_followed_by_the_header_of_the_next():
    row = _Row([90], TURNS, {96})
    assert [row.begin(1), row.is_asking] == [[90], True]
    assert [row.take(token) for token in (5, 6, 96, 1, 7)] == [5, 6, 96, 91, 7]
    assert not row.is_asking
    assert [row.take(token) for token in (96, 1, 8)] == [96, 90, 8]
    assert row.is_asking


def test_a_question_without_end_is_ended(monkeypatch):
    monkeypatch.setattr("hf_kvopt.speculation.training.writer._LONGEST_QUESTION", 2)
    row = _Row([], TURNS, {96})
    assert [row.take(token) for token in (5, 6, 7, 7, 7)] == [5, 6, 96, 91, 7]


def test_turns_are_cut_from_the_chat_template():
    words = tokenizer()
    assert turns_of(words) is None
    words.chat_template = TEMPLATE
    # A tokenizer of words: the tokens of the marks fall away with the text around them.
    assert turns_of(words) == TURNS
    words.chat_template = "{% for m in messages %}w3 {% endfor %}"
    assert turns_of(words) is None


def test_openings_are_pieces_of_different_documents(tmp_path):
    for number in range(6):
        (tmp_path / f"{number}.txt").write_text(" ".join(f"w{10 * number + i}" for i in range(10)))
    found = openings(TokenRows([str(tmp_path)], tokenizer(), 12), 6, 0)
    assert len({piece[0] // 10 for piece in found}) == 6
    assert all(2 <= len(piece) <= 8 for piece in found)
    with pytest.raises(ValueError, match="a text of at least 20 tokens"):
        openings(TokenRows([str(tmp_path)], tokenizer(), 120), 1, 0)


def rows(count, start=0):
    ids = torch.arange(start, start + count)[:, None].repeat(1, 5)
    top = torch.stack([ids, ids + 1], -1)
    return ids, Seen(torch.randn(count, 5, 8).bfloat16().float(), top, torch.rand(count, 5, 2).half().float())


def test_a_store_gives_back_what_was_added_and_keeps_the_first_rows_apart(tmp_path):
    store = FeatureStore(tmp_path, {"model": "a"}, num_heldout=3)
    parts = [rows(2), rows(4, 2), rows(3, 6)]
    for ids, seen in parts:
        store.add(ids, seen)
    assert store.num_rows == 9
    heldout = store.heldout()
    assert heldout is not None
    assert heldout[0][:, 0].tolist() == [0, 1, 2]
    assert torch.equal(heldout[1].features[:2], parts[0][1].features)
    got = list(store)
    assert sorted(int(row[0][0]) for row in got) == [3, 4, 5, 6, 7, 8]
    for ids, features, top_ids, top_p in got:
        number = int(ids[0])
        source, at = (parts[1], number - 2) if number < 6 else (parts[2], number - 6)
        assert torch.equal(features.float(), source[1].features[at])
        assert torch.equal(top_ids, source[1].top_ids[at])
        assert torch.equal(top_p, source[1].top_p[at])
    store.set_epoch(1)
    assert [int(row[0][0]) for row in store] != [int(row[0][0]) for row in got]
    assert store.count_tokens(VOCAB).sum() == 9 * 5


def test_rows_of_something_else_are_refused_and_half_a_part_is_not_read(tmp_path):
    FeatureStore(tmp_path, {"model": "a", "layers": [1]}).add(*rows(2))
    (tmp_path / "part-00001.new").write_bytes(b"half")
    assert FeatureStore(tmp_path, {"model": "a", "layers": [1]}).num_rows == 2
    with pytest.raises(ValueError, match=r"were made from layers \[1\]: got layers \[2\]; give another --out"):
        FeatureStore(tmp_path, {"model": "a", "layers": [2]})
