"""The guard of coarse keys: what counts as a shift, what a rotation is, and what both are worth."""

import pytest
import torch
from torch import Tensor

from hf_kvopt.quant import (
    CENTRE_TOKENS,
    NO_GUARD,
    Guard,
    centre_of,
    dequantize,
    get_format,
    guard_for,
    hadamard,
    quantize,
    rotate,
    unguarded,
)

DIMS = (2, 8, 40, 64, 80, 96, 128, 192, 256)


def keys(loud: dict[int, float], tokens: int = 40, dim: int = 64, seed: int = 0) -> Tensor:
    """[2, 3, tokens, dim] noise with a constant on some channels."""
    x = torch.randn(2, 3, tokens, dim, generator=torch.Generator().manual_seed(seed))
    for channel, shift in loud.items():
        x[..., channel] += shift
    return x


def error(x: Tensor, name: str, centre: Tensor | None, rotates: bool) -> float:
    """Mean squared error of `x` stored in a format."""
    fmt = get_format(name)
    y = x if centre is None else x - centre.unsqueeze(2)
    stored = dequantize(*quantize(hadamard(y) if rotates else y, fmt), fmt)
    return float((unguarded(stored, rotates, centre) - x).square().mean())


@pytest.mark.parametrize("dim", DIMS)
def test_hadamard_is_orthonormal_and_its_own_inverse(dim: int) -> None:
    x = torch.randn(5, dim, generator=torch.Generator().manual_seed(0))
    matrix = hadamard(torch.eye(dim))
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(dim), atol=1e-6)
    assert torch.allclose(hadamard(x), x @ matrix, atol=1e-5)
    assert torch.allclose(hadamard(hadamard(x)), x, atol=1e-5)


@pytest.mark.parametrize("dim", DIMS)
def test_a_vector_is_rotated_alike_alone_and_among_others(dim: int) -> None:
    x = torch.randn(7, 3, 5, dim, generator=torch.Generator().manual_seed(0))
    assert torch.equal(hadamard(x)[2, 1, 3], hadamard(x[2, 1, 3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_scores_of_a_rotated_query_with_rotated_keys_are_the_scores(dtype: torch.dtype) -> None:
    x = keys({})
    q = torch.randn(2, 3, 4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert rotate(q).dtype == dtype
    want = q.float() @ x.transpose(2, 3)
    tolerance = 1e-4 if dtype == torch.float32 else 40 * torch.finfo(dtype).eps
    assert torch.allclose(rotate(q).float() @ hadamard(x).transpose(2, 3), want, atol=tolerance)


@pytest.mark.parametrize("tokens", [1, 2, CENTRE_TOKENS, 40])
def test_a_shift_is_found_where_it_is_and_nowhere_else(tokens: int) -> None:
    centre = centre_of(keys({30: 50.0, 31: -40.0}, tokens)[:, :, :CENTRE_TOKENS])
    assert centre.shape == (2, 3, 64)
    assert centre[..., 30].sub(50).abs().max() < 4
    assert centre[..., 31].add(40).abs().max() < 4
    assert not centre[..., [*range(30), *range(32, 64)]].any()


def test_a_token_unlike_the_rest_neither_makes_a_centre_nor_hides_one() -> None:
    x = keys({30: 50.0}, CENTRE_TOKENS)
    wanted = centre_of(x)
    x[:, :, 0, 30] = 0.0
    x[:, :, 0, 7] = -80.0
    assert (centre_of(x) - wanted).abs().max() < 1
    x[:, :, 1:3, 30] = -20.0  # three are too many
    assert not centre_of(x).any()


def test_noise_has_no_centre() -> None:
    assert not centre_of(keys({}, CENTRE_TOKENS)).any()


def test_a_channel_that_turns_is_no_shift() -> None:
    x = keys({}, CENTRE_TOKENS)
    x[..., 5] += 50 * torch.cos(torch.arange(CENTRE_TOKENS) * 0.4)
    assert not centre_of(x).any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_value_that_is_no_number_makes_no_such_centre(bad: float) -> None:
    x = keys({30: 50.0}, CENTRE_TOKENS)
    x[0, 0, 3, 30] = bad
    centre = centre_of(x)
    assert centre.isfinite().all()
    assert centre[0, 0, 30].sub(50).abs() < 4 or not centre[0, 0].any()
    assert centre[1, :, 30].all()


def test_rows_do_not_depend_on_each_other() -> None:
    x = keys({30: 50.0})
    alone = centre_of(x[:1])
    x[1] *= 100
    assert torch.equal(centre_of(x)[:1], alone)


def test_shift_and_rotation_are_each_worth_it_at_four_bits() -> None:
    x = keys({30: 50.0, 31: -45.0, 62: 40.0, 63: 55.0})
    centre = centre_of(x[:, :, :CENTRE_TOKENS])
    naive, rotated, shifted = (
        error(x, "int4", None, False),
        error(x, "int4", None, True),
        error(x, "int4", centre, False),
    )
    assert shifted < 0.02 * naive
    assert error(x, "int4", centre, True) < shifted < rotated < naive


@pytest.mark.parametrize("name", ["int8", "fp8_e4m3", "fp8_e5m2"])
def test_shift_is_worth_it_at_eight_bits(name: str) -> None:
    x = keys({30: 50.0, 31: -45.0, 62: 40.0, 63: 55.0})
    centre = centre_of(x[:, :, :CENTRE_TOKENS])
    assert error(x, name, centre, False) < 0.02 * error(x, name, None, False)


def test_which_format_is_guarded() -> None:
    assert all(guard_for(get_format(name)) == Guard(centres=True, rotates=True) for name in ("int4", "int8"))
    assert all(guard_for(get_format(name)) == Guard(centres=True, rotates=False) for name in ("fp8_e4m3", "fp8_e5m2"))
    assert guard_for(get_format("native")) == NO_GUARD
