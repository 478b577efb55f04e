"""seal_blocks against `quant.sealed.seal`: the same bytes, from exact places and from the states of a step."""

import pytest
import torch

from hf_kvopt.kernels.sealed_kv import BothForms, Full
from hf_kvopt.kernels.triton.seal_blocks import can_seal, seal_blocks
from hf_kvopt.quant.sealed import seal
from hf_kvopt.quant.sealed_formats import SEALED, BlockCodec

BLOCK, HEADS = 16, 2
CODECS = {
    **{f"{name} {side}": getattr(codec, side) for name, codec in SEALED.items() for side in ("k", "v")},
    "not rotated": BlockCodec(bits=4, rotates=False),
    "two bits centred": BlockCodec(bits=2, centred=True, group=16),
}


def forms(codec, dim, new, block_size=BLOCK):
    """Storage of six blocks that hold what no sealing gives, and five exact ones."""
    return BothForms(
        torch.full((6, block_size, HEADS, codec.width(dim)), 0xA5, dtype=torch.uint8),
        torch.full((6, block_size, HEADS, codec.num_groups(dim)), 7.0, dtype=torch.float16),
        torch.full((6, HEADS, dim), 7.0, dtype=torch.float16) if codec.centred else None,
        torch.randn(5, block_size, HEADS, dim).to(new.dtype),
        codec,
        new,
    )


def states(dim, dtype=torch.float32, block_size=BLOCK):
    """States of a step as a model hands them over, with a loud channel."""
    made = 3 * torch.randn(2, 3 * block_size, HEADS, dim)
    made[..., 3] += 20
    return made.to(dtype).transpose(1, 2)


def assert_sealed(x, block_size=BLOCK):
    """Blocks 4, 1 and 2 are what `seal` makes of their tokens, and the others as they were."""
    size = block_size
    parts = [x.exact[3].transpose(0, 1), x.new[0, :, 3 : 3 + size], x.new[1, :, size + 4 : 2 * size + 4]]
    want = seal(torch.stack(parts), x.codec)
    blocks = [4, 1, 2]
    assert torch.equal(x.codes[blocks].transpose(1, 2), want.codes)
    assert torch.equal(x.token[blocks].transpose(1, 2).isnan(), want.token.isnan())
    assert torch.equal(x.token[blocks].transpose(1, 2).nan_to_num(), want.token.nan_to_num())
    assert (want.mean is None) == (x.mean is None)
    assert want.mean is None or torch.equal(x.mean[blocks], want.mean)
    assert (x.codes[[0, 3, 5]] == 0xA5).all()
    assert (x.token[[0, 3, 5]] == 7).all()


FULL = Full(*torch.tensor([[4, 1, -1, 2], [3, -1, -1, -1], [0, 0, 0, 1], [0, 3, 0, 20]]).unbind())


@pytest.mark.parametrize("dim", [32, 40, 96, 128])
@pytest.mark.parametrize("name", CODECS)
def test_bytes_are_those_of_the_reference(name, dim):
    codec, other = CODECS[name], BlockCodec(bits=4)
    x, y = (forms(c, dim, states(dim)) for c in (codec, other))
    seal_blocks(x, y, FULL)
    assert_sealed(x)
    assert_sealed(y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_states_of_half_precision(dtype):
    k, v = (forms(codec, 64, states(64, dtype)) for codec in SEALED["k4v2"].planes)
    seal_blocks(k, v, FULL)
    assert_sealed(k)
    assert_sealed(v)


def test_blocks_of_32_and_heads_of_unlike_sizes():
    full = FULL._replace(firsts=torch.tensor([0, 3, 0, 36]))
    k, v = (forms(BlockCodec(bits=4), dim, states(dim, block_size=32), 32) for dim in (64, 32))
    seal_blocks(k, v, full)
    assert_sealed(k, 32)
    assert_sealed(v, 32)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e9])
def test_a_token_that_cannot_be_stored_has_no_part_in_the_others(wrong):
    k, v = (forms(codec, 32, states(32)) for codec in SEALED["int4"].planes)
    for x in (k, v):
        x.new[0, 1, 7, 2] = wrong
        x.new[1, 0, 22] = 0.0
    seal_blocks(k, v, FULL)
    assert_sealed(k)
    assert_sealed(v)
    assert int(k.token[1].isnan().sum()) == 1


def test_a_codec_of_odd_groups_is_left_to_pytorch():
    assert can_seal(BlockCodec(bits=2, group=32), 96)
    assert not can_seal(BlockCodec(bits=2, group=24), 96)
