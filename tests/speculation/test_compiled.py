"""An EAGLE-3 session with the compiled CPU kernel compared with the session in torch."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from hf_kvopt.kernels.cpu.draft import MAX_FIRST
from hf_kvopt.kernels.cpu.program import can_compile
from hf_kvopt.speculation.drafters.base import Plan, Read
from hf_kvopt.speculation.heads.compiled import CompiledSteps, weights_of
from hf_kvopt.speculation.heads.config import EagleConfig
from hf_kvopt.speculation.heads.eagle import EagleHead
from tests.helpers import VOCAB, tiny_model
from tests.speculation.heads import HIDDEN, KINDS, Greedy, tiny_head

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")


def make_read(counts: list[int], firsts: list[int], seed: int, features: int = 3 * HIDDEN) -> Read:
    generator = torch.Generator().manual_seed(seed)
    shape = len(counts), max(counts)
    tokens, following = (torch.randint(3, VOCAB, shape, generator=generator) for _ in range(2))
    positions = torch.tensor([[first + i for i in range(max(counts))] for first in firsts])
    return Read(tokens, following, positions, torch.randn(*shape, features, generator=generator), counts)


class Pair:
    """Two sessions of one head: one compiled, one in torch."""

    def __init__(self, rows: int, head: EagleHead | None = None) -> None:
        self.head = head or tiny_head("eagle3 compiled")
        self.compiled, self.plain = (each.begin(tiny_model(), rows) for each in (self.head, deepcopy(self.head)))
        assert self.compiled._weights is not None
        self.plain._weights = None
        self.firsts, self.seed = [0] * rows, 0

    def extend(self, *counts: int) -> None:
        read = make_read(list(counts), self.firsts, self.seed)
        self.firsts = [first + count for first, count in zip(self.firsts, counts, strict=True)]
        self.seed += 1
        for session in (self.compiled, self.plain):
            session.extend(read)

    def check(self, plan: Plan) -> None:
        mine, theirs = (session.propose(plan, Greedy()) for session in (self.compiled, self.plain))
        assert torch.equal(mine.tokens, theirs.tokens)
        assert (mine.parents is None) == (theirs.parents is None)
        if mine.parents is not None:
            assert torch.equal(mine.parents, theirs.parents)

    def select(self, *rows: int) -> None:
        self.firsts = [self.firsts[row] for row in rows]
        for session in (self.compiled, self.plain):
            session.select(rows)


CHAIN, TREE = Plan(4, 4), Plan(3, 8, 3)


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def test_rows_that_keep_unlike_numbers_of_tokens():
    pair = Pair(3)
    pair.extend(20, 20, 20)
    for counts in ((1, 1, 1), (3, 1, 5), (2, 2, 2), (1, 4, 4)):
        pair.check(CHAIN)
        pair.extend(*counts)
    pair.check(CHAIN)
    assert isinstance(pair.compiled._steps, CompiledSteps)
    pair.compiled._cache.check_integrity()


@pytest.mark.parametrize("limit", [0.02, 0.1, 0.5])
def test_chains_end_alike(limit):
    pair = Pair(2)
    pair.extend(9, 7)
    for counts in ((1, 2), (3, 3), (2, 1)):
        pair.check(Plan(6, 6, min_confidence=limit))
        pair.extend(*counts)


def test_reads_without_a_draft_between_them_and_long_ones():
    pair = Pair(2)
    pair.extend(9, 9)
    pair.check(CHAIN)
    for counts in ((2, 1), (1, 3), (MAX_FIRST, 5), (1, 1), (MAX_FIRST + 3, MAX_FIRST)):
        pair.extend(*counts)
    pair.check(CHAIN)
    pair.extend(1, 2)
    pair.extend(MAX_FIRST, 1)
    pair.check(CHAIN)


def test_trees_and_chains_in_turn():
    pair = Pair(1)
    pair.extend(12)
    for plan in (CHAIN, TREE, CHAIN, CHAIN, TREE, TREE):
        pair.check(plan)
        pair.extend(2)
    # Also without new tokens.
    for plan in (TREE, CHAIN, TREE, CHAIN, CHAIN):
        pair.check(plan)


def test_rows_that_leave_and_come_in_another_order():
    pair = Pair(4)
    pair.extend(9, 8, 7, 6)
    pair.check(CHAIN)
    pair.extend(1, 2, 3, 4)
    pair.select(3, 0, 1)
    pair.check(CHAIN)
    pair.extend(2, 2, 1)
    pair.check(CHAIN)
    pair.select(1)
    pair.check(CHAIN)


class Drawn:
    """Sampler that takes the second best token, and returns the softmax as q."""

    is_greedy = False

    def __call__(self, logits):
        return logits.topk(2).indices[:, 1], torch.softmax(logits, -1)


def test_drawn_chains_come_with_the_distribution_they_were_drawn_from():
    pair = Pair(3)
    pair.extend(9, 8, 7)
    for counts in ((1, 1, 1), (2, 1, 3), (4, 4, 4)):
        mine, theirs = (session.propose(CHAIN, Drawn()) for session in (pair.compiled, pair.plain))
        assert torch.equal(mine.tokens, theirs.tokens)
        assert mine.q is not None
        assert torch.allclose(mine.q, theirs.q, atol=1e-5)
        pair.check(CHAIN)  # drawing has changed nothing
        pair.extend(*counts)


def bound(**changes: object) -> EagleHead:
    sizes = {
        "vocab_size": VOCAB, "hidden_size": HIDDEN, "draft_vocab_size": 64, "intermediate_size": 64, "head_dim": 32,
        "num_attention_heads": 2, "num_key_value_heads": 1, "target_layer_ids": (0, 1, -1),
    }  # fmt: skip
    head = EagleHead(EagleConfig(**{**sizes, **changes}))
    head.bind(tiny_model())
    return head


@pytest.mark.parametrize("heads", [(2, 2), (3, 1), (6, 1), (8, 1), (9, 3)], ids=str)
def test_groups_of_every_size_over_rows_read_in_pieces(heads):
    pair = Pair(2, bound(num_attention_heads=heads[0], num_key_value_heads=heads[1]))
    pair.extend(700, 5)
    for counts in ((1, 3), (4, 1)):
        pair.check(CHAIN)
        pair.extend(*counts)
    pair.check(CHAIN)


def test_a_head_that_is_cast_while_it_drafts_goes_on_as_it_was():
    pair = Pair(2)
    pair.extend(9, 7)
    pair.check(CHAIN)
    pair.extend(2, 1)
    pair.head.half()
    pair.check(CHAIN)


def test_the_default_device_does_not_matter():
    pair = Pair(2)
    pair.extend(9, 7)
    drawn = [session.propose(CHAIN, Drawn()).tokens for session in (pair.compiled, pair.plain)]
    read = make_read([2, 1], pair.firsts, 1)
    pair.plain.extend(read)
    wanted = pair.plain.propose(CHAIN, Greedy()).tokens
    with torch.device("meta"):
        pair.compiled.extend(read)
        assert torch.equal(pair.compiled.propose(CHAIN, Greedy()).tokens, wanted)
        pair.head.rotary.reserve(5000, torch.device("cpu"), torch.float32)
    assert torch.equal(*drawn)


def test_there_are_rotations_for_padding_too():
    pair = Pair(2)
    pair.firsts = [4094 - 9, 0]
    pair.extend(9, 9)
    pair.check(Plan(1, 1))
    pair.extend(1, 9)
    pair.check(Plan(1, 1))
    # The first row's last token is at 4094, its padding goes on to 4102.
    assert len(pair.head.rotary.reserve(0, torch.device("cpu"), torch.float32)) > 4102


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 2}, {"attention_bias": True}, {"mlp_bias": True}, {"qk_norm": True},
        {"norm_output": True}, {"hidden_act": "gelu"}, {"head_dim": 24}, {"draft_vocab_size": 41},
        {"eagle_version": 1, "draft_vocab_size": 0, "target_layer_ids": None},
    ],
    ids=str,
)  # fmt: skip
def test_heads_of_another_make_are_left_to_torch(changes):
    assert weights_of(bound()) is not None
    assert weights_of(bound(**changes)) is None


def test_changed_modules_are_left_to_torch():
    class Scaled(nn.Embedding):
        pass

    for name in ("lm_head", "layers.0.o_proj", "layers.0", "", "embeddings"):
        head = bound()
        module = head.shared.embeddings if name == "embeddings" else head.get_submodule(name)
        assert weights_of(head) is not None
        module.register_forward_pre_hook(lambda *_: None)
        assert weights_of(head) is None, name
    head = bound()
    head.shared.embeddings.__class__ = Scaled
    assert weights_of(head) is None
    head = bound()
    head.shared.embeddings.max_norm = 1.0
    assert weights_of(head) is None


@pytest.mark.parametrize("changes", [{"fc_norm": True}, {"norm_before_fc": True}, {"fc_bias": True}], ids=str)
def test_features_are_combined_by_torch_where_the_kernel_cannot(changes):
    weights = weights_of(bound(**changes))
    assert weights is not None
    assert weights.fc is None
    assert weights_of(bound()).fc is not None


def test_the_other_kinds_are_those_that_torch_computes():
    for kind in KINDS:
        head = tiny_head(kind)
        head.bind(tiny_model())
        takes = isinstance(head, EagleHead) and weights_of(head) is not None
        assert takes == (kind in ("eagle3 compiled", "eagle3 with the target's lm head")), kind
