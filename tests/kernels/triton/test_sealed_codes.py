"""The PTX that unpacks codes of sealed blocks, executed instruction by instruction, against `quant.sealed.unpack`."""

import os

import pytest
import torch

pytest.importorskip("triton")

from hf_kvopt.kernels.triton import codes, sealed_codes
from tests.kernels.triton import test_codes_of_formats as ptx

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="says nothing about the interpreter")

# Registers of four bytes, and others of which each byte holds the third bits.
LOW = ptx.REGISTER
HIGH = LOW * 48271 % (1 << 32)


def as_bytes(register):
    """[n] registers as [n, 4] bytes."""
    return torch.stack([register >> 8 * i & 255 for i in range(4)], dim=1)


def run(asm, num_outputs, second=None):
    """Execute asm over all registers."""
    return ptx.execute(asm.value, num_outputs, second)


def planes_of(outputs, dtype, per_plane):
    """[planes, n, elements] values of the registers that asm returned."""
    halves = [ptx.halves(register, dtype).double() for register in outputs]
    return [torch.cat(halves[i : i + per_plane], dim=1) for i in range(0, len(halves), per_plane)]


def test_four_bits_of_values_are_the_codes_less_their_middle():
    elements = ptx.halves(LOW, torch.int16).long() & 0xFFFF
    for plane, got in enumerate(planes_of(run(sealed_codes._FOUR_VALUES, 4), torch.bfloat16, 1)):
        assert torch.equal(got, (elements >> 4 * plane & 15) - 7.5)


def test_two_bits_of_values_are_the_codes_less_their_middle():
    for plane, got in enumerate(planes_of(run(sealed_codes._TWO_VALUES, 8), torch.bfloat16, 2)):
        assert torch.equal(got, (as_bytes(LOW) >> 2 * plane & 3) - 1.5)


@pytest.mark.parametrize("kind", ["keys", "values"])
def test_three_bits_are_put_together_from_both_bytes(kind):
    asm = sealed_codes._THREE_KEYS if kind == "keys" else sealed_codes._THREE_VALUES
    dtype = torch.float16 if kind == "keys" else torch.bfloat16
    for plane, got in enumerate(planes_of(run(asm, 8, HIGH), dtype, 2)):
        code = as_bytes(LOW) >> 2 * plane & 3 | (as_bytes(HIGH) >> 2 * plane & 1) << 2
        assert torch.equal(got * codes.KEY_UNIT if kind == "keys" else got + 3.5, code.double())


def test_eight_bits_of_keys_are_the_codes_but_for_the_unit():
    elements = ptx.halves(LOW, torch.int16).long() & 0xFFFF
    for plane, got in enumerate(planes_of(run(sealed_codes._EIGHT_KEYS, 2), torch.float16, 1)):
        assert torch.equal(got * codes.KEY_UNIT, (elements >> 8 * plane & 255).double())
