"""Assistants with convolution and recurrent states: drafts are what they would write by themselves, row by row."""

from typing import Any

import pytest
import torch
from torch import Tensor

import hf_kvopt
from hf_kvopt import UnsupportedModel
from hf_kvopt.cache.stepwise import TokenByToken
from hf_kvopt.speculation.drafters.assistant_reader import AssistantReader
from tests.speculation.test_assistants import letters, words
from tests.speculation.test_states import NAMES, built, inputs, tokens

pytestmark = pytest.mark.usefixtures("one_thread")
each_kind = pytest.mark.parametrize("name", NAMES)


def assisted(target: str, assistant: str, **kwargs: Any) -> Any:
    return hf_kvopt.speculative(built(assistant), gamma=4, fallback=False, **kwargs)


@each_kind
@pytest.mark.parametrize("rows", [1, 3])
def test_an_assistant_that_is_the_target_is_always_right(name: str, rows: int) -> None:
    target, given, spec = built(name), inputs(rows), assisted(name, name)
    assert torch.equal(tokens(target, given, custom_generate=spec), tokens(target, given))
    # Padding never reaches the assistant, whose rows begin with their first token.
    assert spec.stats.accepted_by_depth[3] >= 0.9 * spec.stats.accepted_by_depth[0] > 0


@each_kind
@pytest.mark.parametrize("rows", [1, 3])
def test_another_assistant_changes_no_token(name: str, rows: int) -> None:
    other = "lfm2" if name != "lfm2" else "qwen3_next"
    target, given, spec = built(name), inputs(rows), assisted(name, other)
    assert torch.equal(tokens(target, given, custom_generate=spec), tokens(target, given))
    assert spec.stats.steps > 0


@each_kind
@torch.no_grad()
def test_rows_of_unlike_length_draft_what_they_would_alone(name: str) -> None:
    model = built(name)
    rows = [torch.randint(5, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (40, 1, 21)]
    reader = AssistantReader(model, 3)
    logits = [reader.read(rows)]
    for draft in ([[7, 8, 9], [3], [4, 5]], [[9] * 20, [1, 2], [6]]):  # rows keep what is not padding
        logits.append(reader.read(draft))
        rows = [row + new for row, new in zip(rows, draft, strict=True)]
    assert reader.read_lens == [len(row) for row in rows]
    alone = [model(torch.tensor([row])).logits[0, -1] for row in rows]
    assert torch.allclose(logits[-1], torch.stack(alone), atol=1e-4)
    reader.close()


@each_kind
@torch.no_grad()
def test_drafted_tokens_are_taken_back_across_forwards(name: str) -> None:
    model = built(name)
    rows = [torch.randint(5, 60, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (20, 9)]
    reader = AssistantReader(model, 2)
    reader.read(rows)
    for token in (11, 12, 13):
        reader.forward(torch.full((2, 1), token))
        reader.read_lens = [n + 1 for n in reader.read_lens]
    assert reader.can_drop([3, 1])
    assert not reader.can_drop([4, 1])
    reader.drop([3, 1])
    logits = reader.read([[30], [31]])
    texts = [[*rows[0], 30], [*rows[1], 11, 12, 31]]
    alone = [model(torch.tensor([row])).logits[0, -1] for row in texts]
    assert torch.allclose(logits, torch.stack(alone), atol=1e-4)
    reader.close()


@pytest.mark.parametrize("tokenizer", [words, letters])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_assistant_of_another_tokenizer_changes_no_token(tokenizer: Any, rows: int) -> None:
    target, given = built("lfm2"), inputs(rows)
    sizes = [model.config.vocab_size for model in (target, built("qwen3_next"))]
    order = torch.randperm(sizes[1], generator=torch.Generator().manual_seed(0)).tolist()
    spec = assisted(
        "lfm2", "qwen3_next", tokenizer=tokenizer(list(range(sizes[0]))), assistant_tokenizer=tokenizer(order)
    )
    assert torch.equal(tokens(target, given, custom_generate=spec), tokens(target, given))
    assert spec.stats.steps > 0


@each_kind
def test_nothing_stays_on_the_assistant(name: str) -> None:
    assistant = built(name)
    spec = hf_kvopt.speculative(assistant, gamma=4, fallback=False)
    tokens(built("lfm2"), inputs(), custom_generate=spec)
    assert not any(isinstance(vars(module).get("forward"), TokenByToken) for module in assistant.modules())


@each_kind
def test_plain_generate_of_an_enabled_model_takes_an_assistant_with_states(name: str) -> None:
    target, given = built("lfm2"), inputs(1)
    wanted = tokens(target, given)
    hf_kvopt.enable(target, draft=hf_kvopt.speculative(built(name), gamma=4, fallback=False))
    assert torch.equal(tokens(target, given), wanted)


def test_what_cannot_be_taken_back_is_refused_before_the_first_token() -> None:
    given: dict[str, Tensor] = inputs(1)
    spec = hf_kvopt.speculative(built("recurrent_gemma"), gamma=4, fallback=False)
    with pytest.raises(UnsupportedModel, match="RecurrentGemmaForCausalLM"):
        tokens(built("lfm2"), given, custom_generate=spec)
