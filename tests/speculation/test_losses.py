"""Training of heads: rolled-out drafts, the loss over them, and the decoding that they would give."""

import pytest
import torch
import torch.nn.functional as F

from hf_kvopt.speculation.training import features
from hf_kvopt.speculation.training.features import Seen, look
from hf_kvopt.speculation.training.losses import Outcome, RolledOutLoss, accepted_lengths, walk
from tests.helpers import VOCAB, generate, tiny_model, unpadded
from tests.speculation.heads import DRAFT_VOCAB, KINDS, features_of, tiny_head
from tests.speculation.test_sessions import greedy_chain, log_q, text

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_rollout_drafts_from_every_position_as_decoding_does(kind):
    """Compare position t, step i, with a text that ends at t + 1 and whose next i tokens were drafted."""
    target, head, row, steps = tiny_model(), tiny_head(kind), text(14), 3
    head.bind(target)
    logits = head.rollout(features_of(head, target, row[None]), row[None], steps)
    assert len(logits) == steps
    for step, t in [(step, t) for step in range(steps) for t in range(len(row) - steps)]:
        expected = log_q(head, target, row[: t + 2], row[t + 2 : t + 2 + step].tolist())
        torch.testing.assert_close(torch.log_softmax(logits[step][0, t], -1), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["eagle3", "eagle1", "medusa"])
@torch.no_grad()
def test_the_loss_is_cross_entropy_with_the_targets_distribution(kind, monkeypatch):
    monkeypatch.setattr(features, "NUM_TOP", VOCAB)
    target, head, rows, steps = tiny_model(), tiny_head(kind), torch.stack([text(12), text(12, 1)]), 3
    head.bind(target)
    outcome = RolledOutLoss(head, steps)(rows, look(target, head.feature_layers, rows))
    logits = target(input_ids=rows).logits
    tokens = head.to_target(torch.arange(head.config.draft_vocab_size))
    expected, hits = 0.0, []
    for step, drafted in enumerate(head.rollout(features_of(head, target, rows), rows, steps)):
        aim = logits[:, 1 + step : 1 + step + 9]
        p = torch.softmax(aim[..., tokens], -1)
        losses = F.cross_entropy(drafted.flatten(0, 1), p.flatten(0, 1), reduction="none")
        can = torch.isin(aim.argmax(-1), tokens).flatten()
        expected += 0.8**step * (losses * can).sum() / can.numel()
        hits.append(tokens[drafted.argmax(-1)] == aim.argmax(-1))
    torch.testing.assert_close(outcome.loss, expected)
    assert torch.equal(outcome.hits, torch.stack(hits))
    if kind != "eagle1":
        assert head.t2d.sum() == DRAFT_VOCAB < VOCAB


def test_gradients_reach_every_weight_of_the_head():
    target, rows = tiny_model(), text(12)[None]
    for kind in KINDS:
        head = tiny_head(kind)
        head.bind(target)
        RolledOutLoss(head, 3)(rows, look(target, head.feature_layers, rows)).loss.backward()
        without = [n for n, p in head.named_parameters() if p.grad is None or not p.grad.any()]
        assert not without, kind


@torch.no_grad()
def test_accepted_lengths_are_those_of_greedy_decoding():
    """Compare, on the target's own continuation, with the head's chain as far as the target accepts it."""
    target, head, steps, start = tiny_model(), tiny_head(), 3, 8
    row = generate(target, unpadded(text(start)[None]), max_new_tokens=30)
    head.bind(target)
    seen = look(target, head.feature_layers, row)
    accepted = accepted_lengths(RolledOutLoss(head, steps)(row, seen), row, seen.best)[0].tolist()
    tokens = row[0].tolist()
    for t in range(start - 1, len(accepted)):
        chain = greedy_chain(head, target, row[0, : t + 2], steps)
        expected = (
            next((i for i, x in enumerate(chain) if x != tokens[t + 2 + i]), steps) if t + 5 <= len(tokens) else None
        )
        assert expected is None or accepted[t] == expected


def test_chains_end_where_the_text_leaves_the_targets_path():
    hits = torch.ones(3, 1, 5, dtype=torch.bool)
    best = torch.zeros(1, 8, dtype=torch.long)
    text_ids = torch.zeros(1, 8, dtype=torch.long)
    assert accepted_lengths(Outcome(torch.tensor(0.0), hits), text_ids, best).tolist() == [[3, 3, 3, 3, 3]]
    # The target does not predict the token at 4 after 3: chains that would feed it stop before it.
    text_ids[0, 4] = 1
    assert accepted_lengths(Outcome(torch.tensor(0.0), hits), text_ids, best).tolist() == [[3, 2, 1, 3, 3]]
    hits[1, 0, 0] = False
    assert accepted_lengths(Outcome(torch.tensor(0.0), hits), text_ids, best).tolist() == [[1, 2, 1, 3, 3]]


def test_a_walk_goes_on_behind_the_bonus_token():
    assert walk([[2, 9, 9, 0, 1, 9]], 0) == [3, 1, 2]
    assert walk([[2, 9, 9, 0, 1, 9]], 5) == [10]
    assert walk([[0, 0], [1, 0]], 0) == [1, 1, 2]


def test_what_is_seen_of_the_target_is_its_most_likely_tokens():
    target, head, rows = tiny_model(), tiny_head(), text(6)[None]
    head.bind(target)
    seen = look(target, head.feature_layers, rows)
    p = torch.softmax(target(input_ids=rows).logits, -1)
    assert isinstance(seen, Seen)
    assert seen.top_ids.shape == (1, 6, features.NUM_TOP)
    torch.testing.assert_close(seen.top_p, p.topk(features.NUM_TOP).values)
    assert torch.equal(seen.top_ids, p.topk(features.NUM_TOP).indices)
    assert torch.equal(seen.best, p.argmax(-1))
    assert torch.equal(seen.features, features_of(head, target, rows))


@torch.no_grad()
def test_tokens_that_the_head_cannot_propose_take_no_part_in_the_loss():
    head = tiny_head()
    head.bind(tiny_model())
    known, unknown = head.t2d.nonzero()[:2, 0].tolist(), int((~head.t2d).nonzero()[0])
    seen = Seen(
        torch.randn(1, 8, 96), torch.tensor([[[known[0], unknown, known[1]]] * 8]), torch.tensor([0.5, 0.3, 0.1])
    )
    seen = seen._replace(top_p=seen.top_p.expand(1, 8, 3))
    places, p = RolledOutLoss(head, 2)._aims(seen)
    assert head.to_target(places)[0, 0, [0, 2]].tolist() == known
    torch.testing.assert_close(p[0, 0], torch.tensor([0.5 / 0.6, 0.0, 0.1 / 0.6]))
