"""Sealed blocks of fixed capacity under any order of operations: the bits of a growing cache, and no place lost."""

import copy
import random

import pytest
import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import PreTrainedModel

from hf_kvopt import CACHE_KEYWORD, OutOfBlocks, QuantizedPagedCache
from hf_kvopt.errors import CacheStateError
from hf_kvopt.kernels import devices
from hf_kvopt.pool.ahead import AheadTable
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.sealed_pool import SealedPool
from hf_kvopt.pool.tail import Tails
from hf_kvopt.quant.policy import LayerName
from hf_kvopt.quant.sealed_formats import MAX_TAIL_BLOCKS, SEALED
from tests.cache.test_sealed_step import BLOCK, ROW, followed, new_cache
from tests.helpers import VOCAB, prompt, tiny_model

BATCH, OPERATIONS = 3, 50


class Pair:
    """A cache of fixed capacity and a growing one of the same format that are fed alike.

    Args:
        model: reads both.
        name: their format.
        seed: of the tokens.
        is_on_host: whether the fixed one takes the branches of a CPU, or of a device without kernels.
    """

    def __init__(self, model: PreTrainedModel, name: str, seed: int, is_on_host: bool) -> None:
        self.model, self.is_on_host = model, is_on_host
        self.fixed, self.growing = new_cache(model, name), new_cache(model, name, fixed=False)
        self.drawn = torch.Generator().manual_seed(seed)
        self.mask = torch.zeros(BATCH, 0, dtype=torch.long)

    def start(self, *lengths: int) -> None:
        """Empty both, and feed rows of these lengths, padded on the left."""
        for cache in (self.fixed, self.growing):
            cache.reset()
        inputs = prompt(*lengths)
        self.mask = inputs["attention_mask"]
        self._feed(inputs["input_ids"])

    def feed(self, num_tokens: int) -> None:
        """Feed as many tokens to each row."""
        self.mask = pad(self.mask, (0, num_tokens), value=1)
        self._feed(torch.randint(3, VOCAB, (BATCH, num_tokens), generator=self.drawn))

    def crop(self, num_tokens: int) -> None:
        """Take the last tokens of each row back."""
        self.mask = self.mask[:, : self.mask.shape[1] - num_tokens]
        for cache in (self.fixed, self.growing):
            cache.crop(-num_tokens)

    def reorder(self, indices: list[int]) -> None:
        """Let row i be what row `indices[i]` was."""
        self.mask = self.mask[indices]
        for cache in (self.fixed, self.growing):
            cache.reorder_cache(torch.tensor(indices))

    def copy(self) -> None:
        """Go on with copies."""
        self.fixed, self.growing = copy.deepcopy(self.fixed), copy.deepcopy(self.growing)

    def _feed(self, ids: Tensor) -> None:
        found = [self._logits(cache, ids) for cache in (self.fixed, self.growing)]
        is_text = self.mask[:, -ids.shape[1] :].bool()
        assert torch.equal(*(logits[is_text] for logits in found))

    @torch.no_grad()
    def _logits(self, cache: QuantizedPagedCache, ids: Tensor) -> Tensor:
        num_tokens, mask = ids.shape[1], self.mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -num_tokens:]
        if cache is self.fixed and num_tokens == 1 and mask.shape[1] > 1:
            mask = pad(mask, (0, ROW - mask.shape[1]))
        with pytest.MonkeyPatch.context() as patch:
            if cache is self.fixed and not self.is_on_host:
                patch.setattr(devices, "is_on_host", lambda tensor: False)
            logits: Tensor = self.model(
                ids, attention_mask=mask, position_ids=positions, **{CACHE_KEYWORD: cache}
            ).logits
        return logits

    def check(self) -> None:
        """Each block and each exact place of the fixed cache belongs to one owner, and memory does not grow."""
        self.fixed.check_integrity()
        (table,) = self.fixed._tables.values()
        assert isinstance(table, AheadTable)
        tails = table.allocator.tails
        assert tails is not None
        assert tails.capacity == BATCH * MAX_TAIL_BLOCKS
        spare = [place for cycle in table.cycles for place in cycle.spare] if table.is_published else []
        assert sorted([*tails.places.values(), *tails._free, *spare]) == list(range(tails.capacity))


@pytest.mark.parametrize("is_on_host", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("seed", range(6))
def test_no_order_of_operations_gives_other_bits_than_a_growing_cache(seed: int, is_on_host: bool) -> None:
    drawn = random.Random(seed)
    pair = Pair(tiny_model(), drawn.choice(["int4", "k4v2"]), seed, is_on_host)
    pair.start(drawn.randint(0, 30), drawn.randint(1, 30), 0)
    last = 0  # tokens that may be taken back without a loss
    for _ in range(OPERATIONS):
        held = pair.mask.shape[1]
        kind = drawn.choices(["step", "chunk", "crop", "reorder", "copy", "start"], [12, 3, 2, 2, 1, 1])[0]
        num_tokens = 1 if kind == "step" else drawn.randint(2, 40)
        if kind == "start" or (kind in ("step", "chunk") and held + num_tokens > ROW):
            pair.start(*(drawn.randint(1, 30) for _ in range(BATCH)))
            last = 0
        elif kind in ("step", "chunk"):
            pair.feed(num_tokens)
            last = num_tokens
        elif kind == "crop":
            pair.crop(drawn.randint(0, last))
            last = 0
        elif kind == "reorder":
            pair.reorder([drawn.randrange(BATCH) for _ in range(BATCH)])
            last = 0
        else:
            pair.copy()
        pair.check()


@pytest.mark.parametrize("chunks", [(120,), (64, 56), (16,) * 7, (1,) * 50, (37, 1, 1, 50), (15, 1, 1, 80)], ids=str)
@torch.no_grad()
def test_a_text_in_one_piece_and_in_chunks_is_stored_as_in_a_growing_cache(chunks: tuple[int, ...]) -> None:
    model, ids, found = tiny_model(), prompt(120)["input_ids"], []
    for fixed in (True, False):
        cache, start = new_cache(model, "int4", 1, fixed=fixed), 0
        for size in chunks:
            model(ids[:, start : start + size], **{CACHE_KEYWORD: cache})
            start += size
        row = cache.layers[0].table.rows[0][1 : start // BLOCK]
        planes = [plane for layer in cache.layers for plane in layer.pool.planes]
        found.append([tensor[row] for plane in planes for tensor in plane.stored])
        found[-1] += [states for layer in cache.layers for states in (layer.keys.clone(), layer.values.clone())]
    for got, want in zip(*found, strict=True):
        assert torch.equal(got, want)


def test_rows_that_keep_most_blocks_exact_change_places_in_the_memory_they_have() -> None:
    pair = Pair(tiny_model(), "int4", seed=0, is_on_host=True)
    pair.start(40, 40, 40)
    pair.feed(60)
    for _ in range(3):
        pair.reorder([1, 1, 1])
        pair.check()
        pair.feed(1)
    pair.feed(20)
    pair.check()


@pytest.mark.parametrize("held", [51, 64, 65])
def test_steps_are_cut_back_by_a_block_without_a_loss(held: int) -> None:
    model, ids = tiny_model(), prompt(20)["input_ids"]
    uncut, cut = new_cache(model, "int4", 1), new_cache(model, "int4", 1)
    followed(model, model, uncut, ids, held - BLOCK - 20)
    followed(model, model, cut, ids, held - 20)
    cut.crop(-BLOCK)
    assert not any(table.is_approximate for table in cut._tables.values())
    assert torch.equal(*(followed(model, model, cache, ids[:, :1], 30) for cache in (uncut, cut)))


@torch.no_grad()
def test_tokens_past_the_capacity_that_nobody_waited_for_are_said_and_reset_ends_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny_model()
    cache, ids = new_cache(model, "int4", 1), prompt(ROW)["input_ids"]
    model(ids, **{CACHE_KEYWORD: cache})
    held = [tensor.clone() for layer in cache.layers for plane in layer.pool.planes for tensor in plane.tensors]
    with monkeypatch.context() as patch:
        patch.setattr(devices, "is_on_host", lambda tensor: False)
        for _ in range(3):
            model(ids[:, :1], attention_mask=torch.ones(1, ROW), **{CACHE_KEYWORD: cache})
    now = [tensor for layer in cache.layers for plane in layer.pool.planes for tensor in plane.tensors]
    assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True))
    for ask in (lambda: cache.layers[0].keys, lambda: cache.crop(-1), cache.stats):
        with pytest.raises(OutOfBlocks, match=f"3 tokens a row were fed beyond the {ROW}"):
            ask()
    cache.reset()
    want = followed(model, model, new_cache(model, "int4", 1, fixed=False), ids[:, :30], 20)
    assert torch.equal(followed(model, model, cache, ids[:, :30], 20), want)


@pytest.mark.parametrize("is_on_host", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("formats", [{}, {0: "native"}, {1: "native"}], ids=str)
@torch.no_grad()
def test_a_step_that_is_refused_or_breaks_off_leaves_all_that_was_held(
    formats: dict[LayerName, str], is_on_host: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, ids = tiny_model(), prompt(40, 40, 40)["input_ids"]
    fixed, other = (new_cache(model, "int4", layer_formats=formats) for _ in range(2))
    for cache in (fixed, other):
        followed(model, model, cache, ids, 5)
    with monkeypatch.context() as patch:
        patch.setattr(devices, "is_on_host", lambda tensor: is_on_host)
        with pytest.raises(CacheStateError, match="holds 3 rows"):
            model(ids[:1, :1], **{CACHE_KEYWORD: fixed})
        patch.setattr(model.model.layers[1].self_attn, "forward", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            model(ids[:, :1], **{CACHE_KEYWORD: fixed})
    with pytest.raises(CacheStateError, match=r"stopped half way.*taken back and 45 are left"):
        model(ids[:, :1], **{CACHE_KEYWORD: fixed})
    assert torch.equal(*(followed(model, model, cache, ids[:, :4], 20) for cache in (fixed, other)))


def _interrupted(*args: object, **kwargs: object) -> None:
    raise KeyboardInterrupt


def test_a_step_stores_the_same_on_a_host_and_on_a_device() -> None:
    found = []
    for is_on_host in (True, False):
        drawn = torch.Generator().manual_seed(0)
        k, v = torch.randn(2, 2, 2, 1, 32, generator=drawn)
        allocator = BlockAllocator(4, block_size=BLOCK)
        allocator.tails = Tails()
        allocator.extend(4)
        allocator.tails.reserve(4)
        pool = SealedPool(k, v, allocator, SEALED["int4"])
        for plane in pool.planes:
            plane.exact.copy_(torch.randn(plane.exact.shape, generator=drawn))
        # Row 0 fills block 0, which is its second one; row 1 does not fill a block.
        blocks, places = torch.tensor([[1, 0], [2, 3]], dtype=torch.int32), torch.tensor([[0, 1], [2, 3]]).int()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(devices, "is_on_host", lambda tensor, is_on_host=is_on_host: is_on_host)
            torch.ops.hf_kvopt.write_sealed(
                k, v, *pool.keys.stored, pool.keys.exact, *pool.values.stored, None, pool.values.exact,
                blocks, places, torch.tensor([0, 5]), torch.tensor(2 * BLOCK - 1), "int4",
            )  # fmt: skip
        found.append([tensor for plane in pool.planes for tensor in plane.tensors])
        assert all(bool(tensor[0].any()) for plane in pool.planes for tensor in plane.stored)
        assert not any(bool(tensor[1:].any()) for plane in pool.planes for tensor in plane.stored)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
