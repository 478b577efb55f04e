"""The compiled sealing of blocks: the bytes of the torch path, whatever is sealed."""

import pytest
import torch

from hf_kvopt.kernels.cpu import seal as compiled
from hf_kvopt.kernels.cpu.program import can_compile
from hf_kvopt.pool import sealed as pool
from hf_kvopt.pool.allocator import BlockAllocator
from hf_kvopt.pool.sealed import SealedPlane
from hf_kvopt.pool.tail import Tails
from hf_kvopt.quant.sealed import seal
from hf_kvopt.quant.sealed_formats import SEALED, BlockCodec
from tests.cache.sealed import feed_in, make_cache, stored, text

pytestmark = pytest.mark.skipif(not can_compile(), reason="needs llvmlite and AVX2")
CODECS = {f"{name}, {plane}": getattr(both, plane) for name, both in SEALED.items() for plane in "kv"} | {
    "not rotated": BlockCodec(bits=2, rotates=False, centred=True)
}
BLOCKS = [0, 2, 4, 5, 7]  # numbers, of 8


def plane_for(states, codec: BlockCodec) -> SealedPlane:
    """An empty plane for states like these."""
    allocator = BlockAllocator(None, block_size=states.shape[2])
    allocator.tails = Tails()
    allocator.ensure_free(8)
    return SealedPlane(states, allocator, codec)


def odd_states(dim: int, dtype: torch.dtype, block_size: int):
    """Blocks with loud channels, tokens that are no numbers, or too large, or nothing, and one of nothing else."""
    made = torch.Generator().manual_seed(dim)
    x = torch.randn(len(BLOCKS), 3, block_size, dim, generator=made)
    x = x * torch.rand(dim, generator=made).mul(2).exp() + 3 * torch.randn(dim, generator=made)
    x[0, 2, 1, 0], x[1, 1, 3, 5], x[4, 1, 2, 0] = float("inf"), float("nan"), 1e6
    x[2, 0, 4], x[3, 2], x[4, 2] = 0.0, 0.0, float("nan")
    return x.to(dtype)


@pytest.mark.parametrize("lanes", [8, 16])
@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
@pytest.mark.parametrize(
    ("dim", "dtype", "block_size"),
    [(64, torch.float32, 64), (72, torch.bfloat16, 16), (80, torch.float16, 32), (128, torch.float32, 16)],
    ids=str,
)
def test_bytes_are_those_of_the_torch_path(codec, dim, dtype, block_size, lanes, monkeypatch):
    if lanes > compiled.lanes():
        pytest.skip("narrower registers")
    monkeypatch.setattr(compiled, "lanes", lambda: lanes)
    x = odd_states(dim, dtype, block_size)
    plane = plane_for(x, codec)
    # Unlike strides in one call, as blocks come from exact places and from a prompt.
    sources = [y if i % 2 else y.transpose(0, 1).contiguous().transpose(0, 1) for i, y in enumerate(x)]
    assert plane.sealed_place is not None
    assert compiled.can_seal(plane.sealed_place, sources)
    compiled.seal_blocks(plane.sealed_place, BLOCKS, sources)
    want, (codes, token, *mean) = seal(x, codec), plane.stored
    assert torch.equal(codes[BLOCKS].transpose(1, 2), want.codes)
    # By their bits, as NaN is no number.
    assert torch.equal(token[BLOCKS].transpose(1, 2).isnan(), want.token.isnan())
    assert torch.equal(token[BLOCKS].transpose(1, 2).nan_to_num(), want.token.nan_to_num())
    assert not mean or torch.equal(mean[0][BLOCKS], want.mean)
    untouched = [i for i in range(8) if i not in BLOCKS]
    assert not any(part[untouched].any() for part in plane.stored)


@pytest.mark.parametrize("dim", [24, 96])
def test_groups_that_share_a_register_are_left_to_torch(dim):
    plane = plane_for(torch.zeros(1, 3, 16, dim), BlockCodec(bits=2, group=12 if dim == 24 else 8))
    assert not compiled.can_seal(plane.sealed_place, [torch.zeros(3, 16, dim)])


@pytest.mark.parametrize("name", SEALED)
def test_a_cache_is_sealed_by_it_as_by_torch(name, monkeypatch):
    whole, caches, calls = text(2, 100), [], []
    original = pool.seal_blocks
    monkeypatch.setattr(pool, "seal_blocks", lambda *args: (calls.append(args), original(*args)))
    for takes in (True, False):
        if not takes:
            monkeypatch.setattr(pool, "can_seal", lambda *_: False)
        caches.append(make_cache(name))
        feed_in(caches[-1], whole, 23)
    assert calls
    for row in range(2):
        assert all(torch.equal(a, b) for a, b in zip(*(stored(cache, row) for cache in caches), strict=True))
