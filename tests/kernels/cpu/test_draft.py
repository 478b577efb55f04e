"""Compiled drafting with an EAGLE-3 layer on a CPU against the layer written out in float64."""

import os

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_kvopt.kernels.cpu import draft as cpu_draft
from hf_kvopt.kernels.cpu.address import address_of
from hf_kvopt.kernels.cpu.draft import Drafting, DraftWeights, Entries, Held, can_draft
from hf_kvopt.kernels.cpu.program import can_compile
from tests.helpers import assert_in_a_forked_child

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")

HIDDEN, INNER, HEADS, KV_HEADS, DIM, VOCAB, TARGET_VOCAB, FEATURES = 64, 96, 4, 2, 32, 96, 160, 192
BLOCK = 16
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def make_weights(dtype: torch.dtype = torch.float32, *, has_fc: bool = False, is_normed: bool = False) -> DraftWeights:
    """A head that is sure enough of its tokens for rounding not to change them."""
    sizes = [
        (HIDDEN,), (HIDDEN,), ((HEADS + 2 * KV_HEADS) * DIM, 2 * HIDDEN), (HIDDEN, HEADS * DIM), (HIDDEN,),
        (2 * INNER, HIDDEN), (HIDDEN, INNER), (HIDDEN,), (VOCAB, HIDDEN),
    ]  # fmt: skip
    matrices = [draw(*size, seed=i, scale=size[-1] ** -0.5 if len(size) > 1 else 1.0) for i, size in enumerate(sizes)]
    fc = draw(HIDDEN, FEATURES, seed=20, scale=FEATURES**-0.5).to(dtype) if has_fc else None
    d2t = torch.randperm(TARGET_VOCAB, generator=torch.Generator().manual_seed(3))[:VOCAB].sort()[0]
    return DraftWeights(
        *(matrix.to(dtype) for matrix in matrices), draw(TARGET_VOCAB, HIDDEN, seed=21), fc, d2t - torch.arange(VOCAB),
        HEADS, KV_HEADS, DIM, is_normed, 1e-6,
    )  # fmt: skip


def rotations(length: int = 4096) -> Tensor:
    """[length, 2, DIM]: cosines, and sines with the signs of "rotate half"."""
    angles = torch.arange(length)[:, None] * 10000.0 ** (-torch.arange(DIM // 2) / (DIM // 2))
    sin = torch.sin(angles)
    return torch.stack([torch.cos(angles).repeat(1, 2), torch.cat([-sin, sin], dim=1)], dim=1).float().contiguous()


class Written:
    """The layer in float64, one row at a time, with keys and values in lists."""

    def __init__(self, weights: DraftWeights, held: list[tuple[Tensor, Tensor]]) -> None:
        self.w = weights
        self.wide = [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in weights]
        self.held = [(k.double(), v.double()) for k, v in held]  # [tokens, KV_HEADS, DIM] of each row

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.w.eps).rsqrt() * weight

    def read(self, row: int, feature: Tensor, token: int, position: int) -> Tensor:
        """The state of one token [HIDDEN]; its key and value are held."""
        input_norm, hidden_norm, qkv, o, post_norm, gate_up, down, _, _, embeds, fc = self.wide[:11]
        feature = feature.double()
        if fc is not None and feature.shape[-1] == FEATURES:
            feature = fc @ feature
        normed = self.norm(feature, hidden_norm)
        x = torch.cat([self.norm(embeds[token], input_norm), normed])
        q, k, v = (qkv @ x).view(-1, DIM).split([HEADS, KV_HEADS, KV_HEADS])
        cos, sin = rotations()[position].double()
        q, k = (t * cos + t.roll(DIM // 2, -1) * sin for t in (q, k))
        keys, values = (torch.cat([old, new[None]]) for old, new in zip(self.held[row], (k, v), strict=True))
        self.held[row] = keys, values
        spread = [t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (keys, values)]
        probs = torch.softmax(torch.einsum("hd,thd->ht", q, spread[0]) * DIM**-0.5, -1)
        attended = torch.einsum("ht,thd->hd", probs, spread[1]).flatten()
        h = (normed if self.w.is_normed_residual else feature) + o @ attended
        gate, up = (gate_up @ self.norm(h, post_norm)).chunk(2)
        return h + down @ (F.silu(gate) * up)

    def logits(self, state: Tensor) -> Tensor:
        return self.wide[8] @ self.norm(state, self.wide[7])

    def token(self, logits: Tensor) -> int:
        best = int(logits.argmax())
        return best + int(self.w.d2t[best])


class Case:
    """Rows of unlike lengths in scattered blocks, some tokens to read, and room for a chain."""

    def __init__(self, lengths: list[int], counts: list[int], steps: int, weights: DraftWeights) -> None:
        self.lengths, self.counts, self.steps, self.weights = lengths, counts, steps, weights
        store, width = weights.qkv.dtype, max(counts)
        rows, most = len(lengths), max(lengths) + width + steps
        per_row = -(-most // BLOCK)
        order = torch.randperm(rows * per_row, generator=torch.Generator().manual_seed(5))
        self.table = order.view(rows, per_row).int()
        # Heads outermost, as pools of a CPU are; what no token has written is no number.
        self.pools = [torch.full((KV_HEADS, rows * per_row, BLOCK, DIM), torch.nan).to(store).movedim(0, 2)
                      for _ in range(2)]  # fmt: skip
        self.held = []
        for row, length in enumerate(lengths):
            states = [draw(length, KV_HEADS, DIM, seed=100 * row + i).to(store) for i in range(2)]
            for pool, x in zip(self.pools, states, strict=True):
                pool.flatten(0, 1)[self.slots_of(row, 0, length)] = x
            self.held.append((states[0].float(), states[1].float()))
        features = weights.fc.shape[1] if weights.fc is not None else HIDDEN
        self.features = draw(rows, width, features, seed=30)
        self.tokens = torch.randint(TARGET_VOCAB, (rows, width), generator=torch.Generator().manual_seed(31))
        self.positions = torch.tensor([[n + 5 + i for i in range(width)] for n in lengths])
        self.rows = rows

    def slots_of(self, row: int, first: int, stop: int) -> Tensor:
        tokens = torch.arange(first, stop)
        return self.table[row].long()[tokens // BLOCK] * BLOCK + tokens % BLOCK

    def run(self, steps: int | None = None, min_confidence: float = 0.0, drafting: Drafting | None = None):
        """(states, tokens, logits) of the kernel."""
        steps, width = self.steps if steps is None else steps, max(self.counts)
        drafting = drafting or Drafting(self.weights, self.rows)
        ends = [length + count for length, count in zip(self.lengths, self.counts, strict=True)]
        slots = torch.stack([self.slots_of(row, n, n + width) for row, n in enumerate(self.lengths)])
        chain = torch.stack([self.slots_of(row, n, n + max(0, steps - 1)) for row, n in enumerate(ends)], dim=1)
        firsts = self.positions.gather(1, torch.tensor(self.counts)[:, None] - 1)
        positions = (firsts + torch.arange(1, max(1, steps))).T.contiguous()
        last = torch.arange(self.rows) * width + torch.tensor(self.counts) - 1
        places = [address_of(pool, None) for pool in self.pools]
        held = Held(*places, self.table, torch.tensor(ends, dtype=torch.int32))
        first = Entries(self.features, self.tokens, self.positions, slots, last)
        made = drafting.run(held, rotations(), first, steps, positions, chain.contiguous(), min_confidence)
        assert held.seq_lens.tolist() == ends, "the caller's lengths were changed"
        return drafting.states.clone(), made, drafting.logits.clone()

    def written(self, drafted: Tensor) -> tuple[Tensor, list[list[int]], Tensor]:
        """(states, tokens, logits of the last step) as written out, fed with what the kernel drafted."""
        layer, states, chains, last = Written(self.weights, self.held), [], [], []
        for row, count in enumerate(self.counts):
            for i in range(count):
                given = self.features[row, i], int(self.tokens[row, i]), int(self.positions[row, i])
                state = layer.read(row, *given)
            states.append(state)
            chain, logits = [], layer.logits(state)
            position = int(self.positions[row, count - 1])
            for depth in range(len(drafted)):
                chain.append(layer.token(logits))
                if depth + 1 < len(drafted):
                    state = layer.read(row, state, int(drafted[depth, row]), position + 1 + depth)
                    logits = layer.logits(state)
            chains.append(chain)
            last.append(logits)
        return torch.stack(states), chains, torch.stack(last)

    def check(self) -> None:
        states, made, logits = self.run()
        want_states, want_tokens, want_logits = self.written(made)
        tolerance = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}[self.weights.qkv.dtype]
        assert len(made) == self.steps
        assert (states - want_states).abs().max() <= tolerance
        assert (logits - want_logits).abs().max() <= tolerance
        if self.weights.qkv.dtype == torch.float32:
            assert made.T.tolist() == want_tokens


BATCHES = [[40], [17, 3], [5, 33, 70], [1, 2, 3, 4, 30, 31, 32, 33]]


@pytest.mark.parametrize("is_normed", [False, True], ids=["feature as residual", "normed residual"])
@pytest.mark.parametrize("has_fc", [False, True], ids=["combined", "fc"])
@pytest.mark.parametrize("lengths", BATCHES, ids=str)
def test_states_tokens_and_logits_are_those_of_the_layer(lengths, has_fc, is_normed):
    counts = [1 + i % 4 for i in range(len(lengths))]
    Case(lengths, counts, 5, make_weights(has_fc=has_fc, is_normed=is_normed)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", [[1], [7], [3, 1, 2, 4, 4]], ids=str)
def test_weights_and_pools_of_every_type(counts, dtype):
    Case([20 + i for i in range(len(counts))], counts, 4, make_weights(dtype, has_fc=True)).check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_embeddings_of_another_type_than_the_weights(dtype):
    weights = make_weights()
    Case([20, 7, 3], [1, 4, 2], 4, weights._replace(embeds=weights.embeds.to(dtype))).check()


def test_long_rows_are_read_in_pieces():
    Case([1100, 2500, 8], [2, 3, 1], 4, make_weights(has_fc=True)).check()


@pytest.mark.parametrize("threads", [1, 3, 8])
def test_any_number_of_threads_gives_the_same(threads, monkeypatch):
    case = Case([5, 33, 70], [2, 3, 1], 5, make_weights(has_fc=True))
    want = case.run()
    monkeypatch.setattr(cpu_draft, "num_threads", lambda: threads)
    assert all(torch.equal(a, b) for a, b in zip(case.run()[:2], want[:2], strict=True))


def test_avx2_computes_the_same(avx2):
    for dtype in DTYPES:
        Case([5, 33, 70, 2, 9], [2, 3, 1, 1, 4], 5, make_weights(dtype, has_fc=True)).check()


def test_a_chain_ends_where_it_is_not_believed_in():
    case = Case([5, 33], [2, 3], 6, make_weights())
    made = case.run()[1]
    joint, means = torch.ones(2, dtype=torch.float64), []
    for depth in range(1, 7):
        # Probabilities of the tokens drafted at this depth, written out.
        logits = case.written(made[:depth])[2]
        joint = joint * torch.softmax(logits, -1).amax(-1)
        means.append(float(joint.mean()))
    for kept in range(6):
        limit = (means[kept - 1] + means[kept]) / 2 if kept else (1 + means[0]) / 2
        assert torch.equal(case.run(min_confidence=limit)[1], made[:kept])
    assert torch.equal(case.run(min_confidence=means[-1] * 0.99)[1], made)


def test_a_chain_goes_on_where_it_is_believed_in_as_much_as_asked():
    weights = make_weights()
    case = Case([5, 33], [2, 3], 6, weights._replace(lm_head=torch.zeros_like(weights.lm_head)))
    likely = float(torch.tensor(1.0) / VOCAB)  # of each token, rounded as the kernel does
    assert len(case.run(min_confidence=likely)[1]) == 1
    assert len(case.run(min_confidence=likely * 1.001)[1]) == 0


def test_norms_of_tiny_states_add_their_eps():
    case = Case([5, 33], [2, 3], 3, make_weights())
    case.features *= 1e-3  # mean squares as small as eps
    case.check()


def test_a_second_draft_begins_where_the_first_did():
    case = Case([5, 33], [2, 3], 5, make_weights(has_fc=True))
    drafting = Drafting(case.weights, 2)
    states, made, _ = case.run(drafting=drafting)
    assert torch.equal(case.run(steps=0, drafting=drafting)[0], states)
    assert torch.equal(case.run(drafting=drafting)[1], made)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("equal", [8, 48], ids=["in a vector", "in many vectors"])
def test_of_equal_logits_the_first_is_taken(equal, threads, monkeypatch):
    monkeypatch.setattr(cpu_draft, "num_threads", lambda: threads)
    weights = make_weights()
    rows = torch.arange(VOCAB) // equal * equal
    weights = weights._replace(lm_head=weights.lm_head[rows].contiguous(), d2t=None)
    assert not (Case([5, 33], [2, 3], 5, weights).run()[1] % equal).any()


def test_what_is_no_number_ends_the_chain():
    case = Case([5, 33], [2, 3], 5, make_weights())
    case.features[1] = torch.nan
    assert len(case.run()[1]) == 0


def test_what_cannot_be_taken_is_left_to_torch():
    weights = make_weights()
    assert can_draft(weights)
    assert not can_draft(weights._replace(o=weights.o.bfloat16()))
    assert not can_draft(weights._replace(norm=weights.norm.to("meta")))
    assert not can_draft(weights._replace(lm_head=weights.lm_head[:90].contiguous()))
    assert not can_draft(weights._replace(lm_head=weights.lm_head.T.contiguous().T))
    assert not can_draft(weights._replace(head_dim=24))
    assert not can_draft(weights._replace(embeds=weights.embeds.double()))
    assert not can_draft(weights._replace(head_dim=288))


class Packed(torch.Tensor):
    """Says that it is a tensor like any other, as quantized weights do, and lies elsewhere."""


def test_what_torch_would_refuse_is_not_read_past_its_end():
    weights = make_weights()
    assert can_draft(weights._replace(d2t=None))
    places = weights.d2t + torch.arange(VOCAB)
    for changes in (
        {"lm_head": draw(VOCAB, 2 * HIDDEN, seed=0)},
        {"norm": draw(HIDDEN // 2, seed=0)},
        {"lm_head": weights.lm_head.as_subclass(Packed)},
        {"d2t": weights.d2t.int()},
        {"d2t": weights.d2t[: VOCAB - 32]},
        {"d2t": weights.d2t.repeat_interleave(2)[::2]},
        {"d2t": weights.d2t + TARGET_VOCAB - int(places.max())},
        {"d2t": weights.d2t - int(places.min()) - 1},
        {"d2t": None, "embeds": weights.embeds[: VOCAB - 1]},
    ):
        assert not can_draft(weights._replace(**changes)), changes


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_drafts_without_waiting_for_threads_that_it_lacks(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    case = Case([5, 33], [2, 3], 4, make_weights(has_fc=True))
    want = case.run()[1]
    assert_in_a_forked_child(lambda: torch.equal(case.run()[1], want))
