"""Suffix lookup: the longest match of the text or of earlier outputs is copied, as far as it is worth it."""

import random
from typing import Any

import pytest
import torch

from hf_kvopt import SuffixLookup, speculative
from hf_kvopt.speculation.drafters.base import Drafter, DraftSession, Plan, Read
from hf_kvopt.speculation.drafters.prompt_lookup import PromptLookup
from hf_kvopt.speculation.drafters.suffix import History, Texts
from tests.helpers import eager_tokens, generate, prompt, tiny_model

TARGET: Any = None
SAMPLER: Any = None


def begun(drafter: Drafter, *texts: list[int]) -> DraftSession:
    """Return a session that was told the texts, the last token of each being the root."""
    session = drafter.begin(TARGET, len(texts))
    width = max(map(len, texts)) - 1
    padded = [[*text, *[0] * (width + 1 - len(text))] for text in texts]
    tokens, following = (torch.tensor([row[i : i + width] for row in padded]) for i in (0, 1))
    session.extend(Read(tokens, following, tokens, None, [len(text) - 1 for text in texts]))
    return session


def drafted(session: DraftSession, gamma: int = 4, least: float = 0.0) -> list[list[int]]:
    draft = session.propose(Plan(gamma, gamma, 1, least), SAMPLER)
    assert draft.lengths is not None
    return [row[:n] for row, n in zip(draft.tokens.tolist(), draft.lengths, strict=True)]


def told(session: DraftSession, new: list[int]) -> None:
    tokens = torch.tensor([[0, *new[:-1]]])
    session.extend(Read(tokens, torch.tensor([new]), tokens, None, [len(new)]))


def test_what_followed_the_longest_match_is_drafted() -> None:
    # 7 follows "2 3" twice, but "1 2 3" was followed by 4 5 6.
    assert drafted(begun(SuffixLookup(0), [1, 2, 3, 4, 5, 6, 9, 2, 3, 7, 8, 2, 3, 7, 1, 2, 3]), 3) == [[4, 5, 6]]


def test_among_equal_matches_the_most_frequent_continuation_wins_and_then_the_newest() -> None:
    assert drafted(begun(SuffixLookup(0), [1, 2, 5, 1, 2, 6, 1, 2, 5, 9, 1, 2]), 1) == [[5]]
    assert drafted(begun(SuffixLookup(0), [1, 2, 5, 1, 2, 6, 1, 2]), 1) == [[6]]


def test_a_loop_is_drafted_as_a_loop() -> None:
    assert drafted(begun(SuffixLookup(0), [9, 1, 2, 3, 1, 2, 3, 1, 2, 3]), 8) == [[1, 2, 3, 1, 2, 3, 1, 2]]


def test_nothing_is_drafted_where_nothing_repeats() -> None:
    assert drafted(begun(SuffixLookup(), list(range(1, 20)))) == [[]]


def test_doubtful_tokens_are_left_out_by_the_sum_over_the_rows() -> None:
    sure, lone = [*range(1, 30), *range(1, 25)], list(range(40, 60))
    assert len(drafted(begun(SuffixLookup(0), sure), 4, least=0.5)[0]) == 4
    # One sure row in five: the others would read its columns for nothing.
    assert drafted(begun(SuffixLookup(0), sure, lone, lone, lone, lone), 4, least=0.5) == [[]] * 5
    assert len(drafted(begun(SuffixLookup(0), sure, lone, lone, lone, lone), 4, least=0.1)[0]) == 4


def test_what_is_refused_is_believed_less() -> None:
    drafter = SuffixLookup(0)
    session = begun(drafter, [1, 2, 3, 4, 1, 2, 3])
    before = drafter.worth[2][0] / drafter.worth[2][1]
    for number in range(6):
        assert drafted(session, 1)
        told(session, [90 + number, 1, 2, 3])
    assert drafter.worth[2][0] / drafter.worth[2][1] < 0.7 * before


def test_earlier_outputs_are_drafted_but_not_earlier_prompts() -> None:
    drafter = SuffixLookup()
    session = begun(drafter, [50, 51, 52, 53])
    told(session, [60, 61, 62, 63, 64, 65])
    session.close()
    assert drafted(begun(drafter, [1, 60, 61, 62]), 3) == [[63, 64, 65]]
    assert drafted(begun(drafter, [1, 50, 51, 52]), 3) == [[]]
    without = SuffixLookup(history_tokens=0)
    session = begun(without, [50, 51])
    told(session, [60, 61, 62, 63])
    session.close()
    assert drafted(begun(without, [1, 60, 61]), 3) == [[]]


def test_tenants_are_not_shown_each_others_outputs() -> None:
    who = ["a"]
    drafter = SuffixLookup(tenant=lambda: who[0])
    session = begun(drafter, [1, 2])
    told(session, [60, 61, 62, 63])
    session.close()
    who[0] = "b"
    assert drafted(begun(drafter, [1, 60, 61]), 2) == [[]]
    who[0] = "a"
    assert drafted(begun(drafter, [1, 60, 61]), 2) == [[62, 63]]
    for number in range(500):
        who[0] = str(number)
        begun(drafter, [1, 2]).close()
    assert len(drafter._histories) == 64


def test_a_history_is_bounded_and_keeps_the_newest() -> None:
    history = History(100)
    for start in range(0, 4000, 20):
        history.add(list(range(start, start + 20)))
        assert sum(len(part.tokens) for part in history.parts) <= 100
    assert history.parts[1].matches([3981, 3982], 10**9)[1]
    assert not any(part.matches([1, 2], 10**9)[1] for part in history.parts)
    history.add(list(range(10_000)))
    assert sum(len(part.tokens) for part in history.parts) <= 100


def test_matches_do_not_reach_over_the_end_of_an_output() -> None:
    drafter = SuffixLookup()
    for output in ([60, 61, 62], [70, 71, 72]):
        session = begun(drafter, [1, 2])
        told(session, output)
        session.close()
    assert drafted(begun(drafter, [5, 61, 62]), 4) == [[]]
    assert drafted(begun(drafter, [5, 60, 61]), 4) == [[62]]


def test_places_of_a_frequent_token_are_bounded() -> None:
    texts = Texts()
    texts.add([1] * 10_000)
    assert max(map(len, texts._places.values())) <= 32
    assert texts.matches([1] * 40, 10_000)[0] == 32


def accepted(drafter: Drafter, cases: list[tuple[list[int], list[int]]]) -> float:
    """Return the drafted tokens that a target which writes these outputs accepts, over the steps."""
    steps = gained = 0
    for text, output in cases:
        session, at = begun(drafter, [*text, output[0]]), 1
        while at < len(output):
            draft = drafted(session, 8, 0.1)[0]
            right = next((i for i, (a, b) in enumerate(zip(draft, output[at:], strict=False)) if a != b), len(draft))
            new = output[at : at + min(right, len(output) - at) + 1]
            told(session, new)
            steps, gained, at = steps + 1, gained + len(new) - 1, at + len(new)
        session.close()
    return gained / steps


def test_agents_that_repeat_tool_output_accept_more_than_by_prompt_lookup() -> None:
    rng = random.Random(0)
    messages = [[1, 2, *(rng.randrange(100, 900) for _ in range(8)), 3] for _ in range(6)]
    cases = []
    for turn in range(6):
        # Each turn says which test it ran, then repeats messages, of which the prompt shows some.
        shown, other = rng.sample(messages, 3), rng.sample(messages, 3)
        output = [10, 11, turn + 50, 12]
        for message in (*shown, *other):
            output += [*message, rng.randrange(1000, 2000), 13]
        cases.append(([turn + 50, *(token for message in shown for token in message)], output))
    assert accepted(SuffixLookup(), cases) >= 1.4 * accepted(PromptLookup(), cases)


@pytest.mark.parametrize("lengths", [(9,), (9, 6, 14)])
def test_generation_is_equal_with_a_history_of_other_texts(lengths: tuple[int, ...]) -> None:
    spec = speculative("suffix", gamma=4, fallback=False)
    for seed in range(3):
        inputs = prompt(*(length + seed for length in lengths))
        wanted = eager_tokens("full", *(length + seed for length in lengths), max_new_tokens=30)
        for _ in range(2):
            assert torch.equal(generate(tiny_model(), inputs, custom_generate=spec, max_new_tokens=30), wanted)
    # The second time each text is known.
    assert spec.stats.mean_accepted_length > 1.5


def test_a_negative_history_is_refused() -> None:
    with pytest.raises(ValueError, match="history_tokens must be 0 or more: got -1"):
        SuffixLookup(-1)
