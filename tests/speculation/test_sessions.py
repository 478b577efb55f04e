"""Drafting with the head's cache compared with the head without one, over the whole text each time."""

from math import exp

import pytest
import torch
from torch import Tensor

from hf_kvopt.speculation.drafters.base import Draft, Plan
from hf_kvopt.speculation.heads.eagle import EagleHead
from hf_kvopt.speculation.heads.growth import TreeGrowth
from tests.helpers import VOCAB, tiny_model
from tests.speculation.heads import EAGLES, KINDS, Greedy, Stochastic, features_of, read_of, tiny_head

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def text(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def log_q(head, target, row: Tensor, drafted: list[int]) -> Tensor:
    """Return log q of the token after `row` and `drafted`, [draft_vocab_size]: no cache, one row."""
    features = features_of(head, target, row[None, :-1])
    if not isinstance(head, EagleHead):
        return torch.log_softmax(head(features[0, -1:])[len(drafted), 0], -1)
    tokens = torch.cat([row[1:], torch.tensor(drafted, dtype=torch.long)])[None]
    hidden = head.combine(features)
    positions = torch.arange(tokens.shape[1])[None]
    for _ in range(len(drafted) + 1):
        length = hidden.shape[1]
        out = head(tokens[:, :length], hidden, head.rotary(positions[:, :length], hidden.dtype), dense_causal)
        hidden = torch.cat([hidden, out[:, -1:]], dim=1)
    return torch.log_softmax(head.logits(out[:, -1])[0], -1)


def dense_causal(layer, q, k, v):
    """Compute attention over whole rows, written out."""
    group, length = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    scores = (q @ k.transpose(-1, -2) * layer.scaling).masked_fill(future, float("-inf"))
    return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2)


def greedy_chain(head, target, row: Tensor, gamma: int) -> list[int]:
    drafted: list[int] = []
    for _ in range(gamma):
        drafted.append(int(head.to_target(log_q(head, target, row, drafted).argmax())))
    return drafted


def begin(head, target, *rows: Tensor):
    head.check(target)
    session = head.begin(target, len(rows))
    session.extend(read_of(head, target, list(rows)))
    return session


@pytest.mark.parametrize("kind", KINDS)
def test_a_chain_is_what_the_head_says_over_the_whole_text(kind):
    target, head, row = tiny_model(), tiny_head(kind), text(19)
    session = begin(head, target, row)
    assert session.propose(Plan(4, 4), Greedy()).tokens.tolist() == [greedy_chain(head, target, row, 4)]
    # Drafting twice gives one draft.
    assert session.propose(Plan(4, 4), Greedy()).tokens.tolist() == [greedy_chain(head, target, row, 4)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_not_kept_is_forgotten(kind):
    target, head, whole = tiny_model(), tiny_head(kind), text(40)
    session = begin(head, target, whole[:19])
    at = 19
    for kept in (1, 3, 2, 5):
        session.propose(Plan(4, 4), Greedy())
        session.extend(read_of(head, target, [whole[: at + kept]], [at - 1]))
        at += kept
        draft = session.propose(Plan(3, 3), Greedy())
        assert draft.tokens.tolist() == [greedy_chain(head, target, whole[:at], 3)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_do_not_see_each_other(kind):
    target, head = tiny_model(), tiny_head(kind)
    wholes = [text(40, seed) for seed in range(3)]
    lengths = [7, 21, 18]
    session = begin(head, target, *(whole[:n] for whole, n in zip(wholes, lengths, strict=True)))
    for kept in ((1, 3, 2), (4, 1, 1), (2, 2, 2)):
        draft = session.propose(Plan(3, 3), Greedy())
        expected = [greedy_chain(head, target, w[:n], 3) for w, n in zip(wholes, lengths, strict=True)]
        assert draft.tokens.tolist() == expected
        starts = [n - 1 for n in lengths]
        lengths = [n + k for n, k in zip(lengths, kept, strict=True)]
        rows = [whole[:n] for whole, n in zip(wholes, lengths, strict=True)]
        session.extend(read_of(head, target, rows, starts))
    session.select([2, 0])
    left = [wholes[2][: lengths[2]], wholes[0][: lengths[0]]]
    draft = session.propose(Plan(3, 3), Greedy())
    assert draft.tokens.tolist() == [greedy_chain(head, target, row, 3) for row in left]


def grown_by_hand(head, target, row: Tensor, plan: Plan) -> dict[tuple[int, ...], float]:
    """Grow EAGLE-2's tree as in the paper: return paths of target ids with their joint log probability."""
    frontier: dict[tuple[int, ...], float] = {(): 0.0}
    candidates: dict[tuple[int, ...], float] = {}
    for _ in range(plan.gamma):
        level = {}
        for path, score in frontier.items():
            best = log_q(head, target, row, list(path)).topk(plan.top_k)
            for value, token in zip(best.values.tolist(), head.to_target(best.indices).tolist(), strict=True):
                level[(*path, token)] = score + value
        candidates |= level
        frontier = dict(sorted(level.items(), key=lambda item: -item[1])[: plan.top_k])
    return dict(sorted(candidates.items(), key=lambda item: -item[1])[: plan.num_nodes])


def paths(draft: Draft, row: int) -> list[tuple[int, ...]]:
    """Return the path of each node, root first; check that parents come before their children."""
    found: list[tuple[int, ...]] = []
    assert draft.parents is not None
    for i, (token, parent) in enumerate(zip(draft.tokens[row].tolist(), draft.parents[row].tolist(), strict=True)):
        assert parent < i
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", [Plan(3, 8, 3), Plan(4, 10, 2), Plan(1, 3, 3)], ids=["wide", "deep", "flat"])
def test_a_tree_is_eagle_2s(kind, plan):
    target, head = tiny_model(), tiny_head(kind)
    rows = [text(19), text(12, 1)] if kind == "medusa" else [text(19)]
    session = begin(head, target, *rows)
    draft = session.propose(plan, Greedy())
    for i, row in enumerate(rows):
        assert set(paths(draft, i)) == set(grown_by_hand(head, target, row, plan))
    # The nodes of a tree leave no trace in the next draft.
    assert session.propose(Plan(3, 3), Greedy()).tokens.tolist() == [greedy_chain(head, target, row, 3) for row in rows]


@pytest.mark.parametrize("kind", EAGLES)
def test_trees_of_several_rows_of_different_lengths(kind):
    target, head, plan = tiny_model(), tiny_head(kind), Plan(3, 7, 3)
    rows = [text(9), text(23, 1)]
    draft = begin(head, target, *rows).propose(plan, Greedy())
    for i, row in enumerate(rows):
        assert set(paths(draft, i)) == set(grown_by_hand(head, target, row, plan))


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_token_comes_with_the_very_distribution_it_was_drawn_from(kind):
    target, head, row = tiny_model(), tiny_head(kind), text(19)
    draft = begin(head, target, row).propose(Plan(3, 3), Stochastic())
    tokens = draft.tokens[0].tolist()
    assert draft.q is not None
    for depth in range(3):
        expected = torch.exp(head.spread(log_q(head, target, row, tokens[:depth])))
        torch.testing.assert_close(draft.q[0, depth], expected, rtol=1e-4, atol=1e-6)
        assert draft.q[0, depth, tokens[depth]] > 0


def test_medusa_drafts_no_deeper_than_it_has_heads():
    head = tiny_head("medusa")
    assert head.max_gamma == 4
    session = begin(head, tiny_model(), text(9))
    assert session.propose(Plan(9, 9), Greedy()).tokens.shape == (1, 4)


@pytest.mark.parametrize("kind", EAGLES)
def test_a_closed_session_holds_no_memory(kind):
    session = begin(tiny_head(kind), tiny_model(), text(30))
    session.propose(Plan(3, 9, 3), Greedy())
    cache = session._cache
    cache.check_integrity()
    session.close()
    assert cache.stats().used_blocks == 0


def test_ties_keep_parents_before_children():
    growth = TreeGrowth(1, Plan(3, 5, 2), torch.device("cpu"))
    certain = torch.tensor([[[0.0, float("-inf"), -50.0]]])
    nodes = 1
    for _ in range(3):
        nodes = growth.expand(certain.expand(1, nodes, 3)).tokens.shape[1]
    draft = growth.draft(lambda x: x)
    assert draft.tokens[0, 0] == 0
    assert all(parent < i for i, parent in enumerate(draft.parents[0].tolist()))


@pytest.mark.parametrize("kind", KINDS)
def test_chains_end_where_the_head_does_not_believe_in_them(kind):
    target, head, rows = tiny_model(), tiny_head(kind), [text(19), text(12, 1)]
    session = begin(head, target, *rows)
    chains = [greedy_chain(head, target, row, 4) for row in rows]
    joints = torch.zeros(2, 4)
    for i, (row, chain) in enumerate(zip(rows, chains, strict=True)):
        joints[i] = torch.stack([log_q(head, target, row, chain[:depth]).max() for depth in range(4)]).cumsum(0).exp()
    mean = joints.mean(0).tolist()
    for limit in (value * factor for value in mean for factor in (0.99, 1.01)):
        draft = session.propose(Plan(4, 4, 1, limit), Greedy())
        length = sum(value >= limit for value in mean)
        assert draft.tokens.tolist() == [chain[:length] for chain in chains]
        assert draft.lengths is None


@pytest.mark.parametrize("kind", ["eagle3", "medusa"])
def test_a_drawn_token_is_never_dropped_for_its_own_value(kind):
    """Check that chains end after the first column that makes them unlikely, and have at least one."""
    target, head, rows = tiny_model(), tiny_head(kind), [text(19), text(12, 1)]
    session = begin(head, target, *rows)
    seen = set()
    for seed in range(20):
        draft = session.propose(Plan(4, 4, 1, 0.05), Stochastic(seed))
        joints = draft.q.gather(2, draft.tokens[:, :, None])[:, :, 0].cumprod(1).mean(0).tolist()
        assert draft.lengths is None
        assert len(joints) == min(4, 1 + sum(joint >= 0.05 for joint in joints))
        seen.add(len(joints))
    assert len(seen) > 1


@pytest.mark.parametrize("kind", ["eagle3", "medusa"])
def test_a_tree_leaves_out_what_the_head_does_not_believe_in(kind):
    target, head, rows = tiny_model(), tiny_head(kind), [text(19), text(12, 1)]
    plan = Plan(3, 9, 3)
    session = begin(head, target, *rows)
    nodes = [grown_by_hand(head, target, row, plan) for row in rows]
    for limit in [exp(score) * 0.99 for score in nodes[0].values()]:
        draft = session.propose(plan._replace(min_confidence=limit), Greedy())
        for i, grown in enumerate(nodes):
            believed = {path for path, score in grown.items() if exp(score) >= limit}
            assert draft.lengths[i] == len(believed)
            assert set(paths(draft, i)[: len(believed)]) == believed


def test_a_session_drafts_for_the_target_that_it_was_begun_for():
    """Share the embeddings of two targets, one after the other."""
    head, row = tiny_head("eagle1"), text(19)
    for seed in (0, 1, 0):
        target = tiny_model(seed=seed)
        session = head.begin(target, 1)
        session.extend(read_of(head, target, [row]))
        assert session.propose(Plan(3, 3), Greedy()).tokens.tolist() == [greedy_chain(head, target, row, 3)]
