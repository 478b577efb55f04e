"""Acceptance: greedy by comparison, sampling without loss: the output has the target's distribution."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from hf_kvopt import speculative
from hf_kvopt.speculation.loop.tree import ancestor_mask, shape_of
from hf_kvopt.speculation.loop.verify import greedy_chain, greedy_tree, sampled_chain, sampled_tree, typical_tree

VOCAB, TRIALS = 6, 15_000
LEAST_P = 1e-4  # a true hypothesis fails once in ten thousand seeds; the seeds here are fixed


def distribution(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(2.0 * torch.randn(*shape, VOCAB, generator=generator), dim=-1)


def assert_drawn_from(counts: Tensor, expected: Tensor) -> None:
    """Check cell `counts` against probabilities `expected` by a chi-square test; rare cells are merged."""
    total = int(counts.sum())
    order = expected.flatten().argsort(descending=True)
    counts, expected = counts.flatten()[order].double(), expected.flatten()[order].double() * total
    assert counts[expected == 0].sum() == 0, "a token that cannot be drawn came out"
    common = expected >= 8
    cells = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    cells, wanted = cells[wanted > 0], wanted[wanted > 0]
    assert len(cells) > 5
    statistic = ((cells - wanted) ** 2 / wanted).sum()
    # The upper tail of the chi-square distribution.
    p = float(torch.special.gammaincc(torch.tensor((len(cells) - 1) / 2).double(), statistic / 2))
    assert p > LEAST_P, f"chi-square says {p:.1e}"


def counted(sequences: list[list[int]], depth: int, p: list[Tensor]) -> Tensor:
    """Count each sequence of `depth` tokens; shorter ones are filled up from p as in plain decoding."""
    counts = torch.zeros([VOCAB] * depth)
    for tokens in sequences:
        tokens = list(tokens[:depth])
        while len(tokens) < depth:
            tokens.append(int(torch.multinomial(p[len(tokens)], 1)))
        counts[tuple(tokens)] += 1
    return counts


def joint(p: list[Tensor]) -> Tensor:
    """Return the probability of each sequence of independent tokens."""
    return torch.einsum("a,b,c->abc", *p)


@pytest.mark.parametrize("with_q", [True, False], ids=["drawn from q", "point masses"])
@pytest.mark.parametrize("short", [False, True], ids=["whole drafts", "drafts of unlike length"])
def test_a_sampled_chain_has_the_targets_distribution(with_q: bool, short: bool) -> None:
    torch.manual_seed(0)
    p, q = list(distribution(3, seed=1)), distribution(2, seed=2)
    if with_q:
        tokens = torch.stack([torch.multinomial(q[d], TRIALS, replacement=True) for d in (0, 1)], dim=1)
    else:
        tokens = torch.tensor([[1, 3]]).expand(TRIALS, -1)
    lengths = torch.randint(0, 3, (TRIALS,)).tolist() if short else None
    verdict = sampled_chain(
        tokens, torch.stack(p).expand(TRIALS, -1, -1), q.expand(TRIALS, -1, -1) if with_q else None, lengths
    )
    assert_drawn_from(counted(verdict.tokens, 3, p), joint(p))
    for path, row in zip(verdict.paths[:100], verdict.tokens[:100], strict=True):
        assert path == list(range(1, len(row)))


def test_a_sampled_tree_has_the_targets_distribution() -> None:
    torch.manual_seed(0)
    # Two children below the root, one of which comes twice, and three below the first.
    parents, tokens = [-1, -1, 0, 0, -1, 0, 1], [2, 4, 1, 5, 2, 3, 2]
    shape, p = shape_of(parents, len(parents)), list(distribution(3, seed=3))
    p[0] = torch.tensor([0.05, 0.05, 0.35, 0.05, 0.4, 0.1])
    at = torch.stack([p[min(depth, 2)] for depth in shape.depths])
    sequences = [sampled_tree(tokens, shape, at).tokens[0] for _ in range(8_000)]
    assert_drawn_from(counted(sequences, 3, p), joint(p))
    assert sum(len(row) > 1 for row in sequences) > 1000


def test_a_token_without_probability_is_never_accepted() -> None:
    p = torch.tensor([[0.0, 0.5, 0.5, 0, 0, 0]] * 2).expand(200, -1, -1)
    verdict = sampled_chain(torch.zeros(200, 1, dtype=torch.long), p, None, None)
    assert {len(row) for row in verdict.tokens} == {1}
    assert {row[0] for row in verdict.tokens} == {1, 2}


def test_a_certain_token_is_always_accepted() -> None:
    p = torch.eye(VOCAB)[[3, 4]].expand(50, -1, -1)
    assert sampled_chain(torch.full((50, 1), 3), p, None, None).tokens == [[3, 4]] * 50


def test_greedy_accepts_what_the_target_would_choose_and_no_more() -> None:
    drafted, choices = torch.tensor([[5, 6, 7], [5, 6, 7], [1, 6, 7]]), torch.tensor([[5, 6, 8, 9]] * 3)
    assert greedy_chain(drafted, choices, None).tokens == [[5, 6, 8], [5, 6, 8], [5]]
    assert greedy_chain(drafted, choices, [1, 0, 3]).tokens == [[5, 6], [5], [5]]


def test_greedy_walks_down_a_tree() -> None:
    shape = shape_of([-1, -1, 1, 1, 3], 5)
    verdict = greedy_tree([7, 8, 1, 2, 3], shape, [8, 0, 2, 0, 3, 4])
    assert verdict.paths == [[2, 4, 5]]
    assert verdict.tokens == [[8, 2, 3, 4]]


def test_typical_acceptance_takes_the_longest_likely_path() -> None:
    p = torch.full((4, VOCAB), 0.01)
    p[0, 1], p[0, 2], p[1, 3] = 0.5, 0.45, 0.95
    verdict = typical_tree([1, 2, 3], shape_of([-1, -1, 0], 3), p, lambda row: row.argmax(dim=-1))
    assert verdict.paths == [[1, 3]]


def test_ancestors_alone_are_seen() -> None:
    mask = ancestor_mask(shape_of([-1, -1, 0, 2], 4))
    seen = [row.nonzero()[:, 0].tolist() for row in mask]
    assert seen == [[0], [0, 1], [0, 2], [0, 1, 3], [0, 1, 3, 4]]


def test_a_parent_behind_its_child_is_refused() -> None:
    with pytest.raises(ValueError, match="before their children"):
        shape_of([1, -1], 2)


def small(seed: int, vocab: int = 12) -> LlamaForCausalLM:
    """Build a target or an assistant whose next-token distribution is far from uniform."""
    config = LlamaConfig(
        vocab_size=vocab, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM._from_config(config, attn_implementation="hf_kvopt").eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def exact(model: LlamaForCausalLM, prompt: list[int], depth: int, temperature: float, k: int, top_p: float) -> Tensor:
    """Return the probability of every continuation of `depth` tokens, by plain forwards and the warpers as defined."""
    vocab = model.config.vocab_size
    total = torch.ones(())
    for length in range(depth):
        ids = torch.cartesian_prod(*[torch.arange(vocab)] * length).view(-1, length) if length else None
        rows = 1 if ids is None else len(ids)
        text = torch.tensor([prompt]).expand(rows, -1)
        with torch.no_grad():
            logits = model(text if ids is None else torch.cat([text, ids], dim=1), use_cache=False).logits[:, -1]
        p = torch.softmax(logits / temperature, dim=-1)
        p = p * (p >= p.topk(k).values[:, -1:])
        ordered, order = (p / p.sum(-1, keepdim=True)).sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        p = torch.zeros_like(p).scatter(1, order, ordered * (before < top_p))
        p = p / p.sum(-1, keepdim=True)
        total = total[..., None] * p.view(*[vocab] * (length + 1))
    return total


@pytest.mark.parametrize("draft", ["assistant", "prompt_lookup", "lookahead"])
def test_generate_draws_from_the_targets_distribution(draft: str) -> None:
    model, text, depth = small(0), [3, 5, 1, 8, 2, 9, 4, 10, 6, 11, 7, 0, 3, 1, 5, 2, 8, 4, 9, 6, 10, 7, 11, 3], 3
    settings = {"temperature": 1.3, "top_k": 7, "top_p": 0.9}
    wanted = exact(model, text, depth, settings["temperature"], settings["top_k"], settings["top_p"])
    spec = speculative(small(1) if draft == "assistant" else draft, gamma=2, fallback=False)
    counts = torch.zeros_like(wanted)
    torch.manual_seed(7)
    for _ in range(8):
        ids = torch.tensor([text]).expand(1000, -1)
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=True, max_new_tokens=depth,
            custom_generate=spec, **settings,
        )[:, len(text) :]  # fmt: skip
        counts.index_put_(tuple(out.T), torch.ones(len(out)), accumulate=True)
    assert spec.stats.accepted_by_depth[0] > 100, "nothing was accepted: the test says nothing"
    assert_drawn_from(counts, wanted)
