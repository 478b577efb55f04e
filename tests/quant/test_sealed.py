"""Sealed blocks: bytes, bounds, independence of what is sealed beside a block, and tokens that are no numbers."""

import pytest
import torch

from hf_kvopt.quant.guard import hadamard
from hf_kvopt.quant.sealed import SealedBlocks, pack, seal, unpack, unseal
from hf_kvopt.quant.sealed_formats import SEALED, BlockCodec

CODECS = {
    "mean out, 4 bits": SEALED["int4"].k,
    "mean out, 3 bits": SEALED["int3"].k,
    "mean out, 8 bits": BlockCodec(bits=8, centred=True),
    "no mean, 4 bits": SEALED["int4"].v,
    "no mean, 2 bits in groups": SEALED["k4v2"].v,
    "no mean, not rotated": BlockCodec(bits=4, rotates=False),
}
by_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
by_dim = pytest.mark.parametrize("dim", [64, 72, 80, 96, 128, 192, 256])


def states(dim, n=3, heads=2, block_size=64, seed=0):
    """Random states whose channels differ in scale and have means of their own."""
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(n, heads, block_size, dim, generator=made)
    return x * torch.rand(dim, generator=made).mul(2).exp() + 3 * torch.randn(dim, generator=made)


@by_codec
@by_dim
def test_packed_codes_come_back(codec, dim):
    codes = torch.randint(0, 1 << codec.bits, (5, dim), dtype=torch.uint8)
    packed = pack(codes, codec)
    assert packed.shape == (5, dim * codec.bits // 8)
    assert torch.equal(unpack(packed, codec, dim), codes)


def test_a_head_size_that_cannot_be_packed_is_refused():
    with pytest.raises(ValueError, match="head_dim must be a multiple of 8 for codes of 3 bits: got 100; use int8"):
        SEALED["int3"].k.parts(100)


@by_codec
@by_dim
def test_bytes_are_those_of_the_tensors(codec, dim):
    stored = seal(states(dim, n=1, heads=1, block_size=32), codec)
    held = sum(part.numel() * part.element_size() for part in stored if part is not None)
    assert held == codec.bytes_per_block(dim, 32)


@by_codec
@by_dim
def test_no_token_strays_beyond_half_a_step_on_average(codec, dim):
    x = states(dim)
    stored = seal(x, codec)
    y, read = (hadamard(v) if codec.rotates else v for v in (x, unseal(stored, codec, dim)))
    mean = torch.zeros_like(y[:, :, :1]) if stored.mean is None else stored.mean.float().unsqueeze(2)
    y, read = ((v - mean).unflatten(-1, (codec.num_groups(dim), -1)) for v in (y, read))
    reach = y.amax(-1) - y.amin(-1)
    error = (y - read).square().mean(-1).sqrt()
    # Half a step of the whole range, and what float16 parameters and products in float32 are off.
    bound = reach / (2**codec.bits - 1) / 2 * 1.01 + (y.abs().amax(-1) + mean.abs().amax()) * 2**-10
    assert (error <= bound).all()


@by_codec
def test_a_block_is_sealed_from_its_tokens_alone(codec):
    x = states(80, n=6)
    together = seal(x, codec)
    strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    for i in range(0, 6, 2):
        for given in (x[i : i + 1], x.flip(0)[5 - i : 6 - i], strided[i : i + 1]):
            alone = seal(given, codec)
            for one, all_of_them in zip(alone, together, strict=True):
                assert one is None or torch.equal(one[0], all_of_them[i])


@by_codec
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e6], ids=str)
def test_a_token_that_is_no_number_reads_as_nan_and_spoils_no_other(codec, value):
    x = states(64)
    clean = torch.cat((x[1:2, :, :7], x[1:2, :, 8:]), dim=2)
    x[1, 1, 7, 3] = value
    read = unseal(seal(x, codec), codec, 64)
    assert read[1, 1, 7].isnan().all()
    others = torch.ones(x.shape[:3], dtype=torch.bool)
    others[1, 1, 7] = False
    assert read[others].isfinite().all()
    # The other tokens of the block are stored as they would be without it.
    assert torch.equal(
        torch.cat((read[1:2, 1:, :7], read[1:2, 1:, 8:]), dim=2), unseal(seal(clean, codec), codec, 64)[:, 1:]
    )


@by_codec
@pytest.mark.parametrize("value", [0.0, -3.0, 1e-7], ids=str)
def test_a_block_of_one_token_many_times_comes_back(codec, value):
    x = torch.full((1, 1, 64, 64), value)
    read = unseal(seal(x, codec), codec, 64)
    assert read.isfinite().all()
    if codec.centred or not value:
        assert torch.allclose(read, x, rtol=1e-3, atol=64 * 2.0**-24)  # float16's least step


@by_codec
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_states_of_half_precision_are_sealed_as_their_values(codec, dtype):
    x = states(64).to(dtype)
    for one, other in zip(seal(x, codec), seal(x.float(), codec), strict=True):
        assert one is None or torch.equal(one, other)


def test_a_bias_that_all_keys_share_costs_nothing():
    # Biases of Qwen2.5's keys reach 354.
    codec, x = SEALED["int4"].k, torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))
    biased = x.clone()
    biased[..., 5] += 354.0

    def loss(given):
        read = unseal(seal(given, codec), codec, 64)
        # What is off by the same in all keys, the mean's own rounding, is no error of a score's differences.
        error = read - given
        return (error - error.mean(2, keepdim=True)).norm() / x.norm()

    assert loss(biased) <= 1.02 * loss(x)


@by_codec
@by_dim
def test_what_is_off_stands_upright_on_the_token(codec, dim):
    # So that a sum over many tokens is not too short; a scale of least squared error leaves up to 11 % of it out.
    x = states(dim)
    stored = seal(x, codec)
    y, read = ((hadamard(v) if codec.rotates else v) for v in (x, unseal(stored, codec, dim)))
    mean = torch.zeros_like(y[:, :, :1]) if stored.mean is None else stored.mean.float().unsqueeze(2)
    y, read = ((v - mean).unflatten(-1, (codec.num_groups(dim), -1)).double() for v in (y, read))
    share = (y * read).sum(-1) / y.square().sum(-1)
    assert (share - 1).abs().max() < 2.0**-9  # float16 scales, and means beside which the rest is small


def test_taking_the_mean_out_pays_where_channels_are_shifted():
    x, codecs = states(64), (SEALED["int4"].k, BlockCodec(bits=4))
    errors = [(unseal(seal(x, codec), codec, 64) - x).norm() for codec in codecs]
    assert errors[0] < 0.85 * errors[1]


def test_blocks_are_a_named_tuple_of_the_parts_that_there_are():
    assert seal(states(64), SEALED["int4"].v).mean is None
    assert isinstance(seal(states(64), SEALED["int4"].k), SealedBlocks)
