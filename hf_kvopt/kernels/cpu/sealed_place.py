"""Address of a layer's sealed and exact blocks in memory, as the compiled kernel takes them."""

from typing import NamedTuple

from torch import Tensor

from hf_kvopt.kernels.cpu.program import MAX_DIM, NAMES
from hf_kvopt.quant.sealed_formats import BlockCodec

_MIN_BLOCK = 16  # a unit of keys lies in one block


class SealedPlace(NamedTuple):
    """Address of the keys or values of a layer, as the kernel takes them; holds as long as the tensors stay."""

    exact: tuple[int, ...]  # address, strides of places, tokens and heads in bytes; no scales
    sealed: tuple[int, ...]  # addresses and strides of codes, parameters of tokens and means
    code: str  # how exact states are stored, a name in codec.CODECS
    codec: BlockCodec
    dim: int
    num_heads: int
    block_size: int


def sealed_place(exact: Tensor, stored: list[Tensor], codec: BlockCodec) -> SealedPlace | None:
    """Return where these tensors of a `SealedPlane` lie; None where the kernel cannot read them."""
    _, block_size, num_heads, dim = exact.shape
    is_power = block_size >= _MIN_BLOCK and not block_size & (block_size - 1)
    if exact.device.type != "cpu" or exact.dtype not in NAMES or dim > MAX_DIM or not is_power:
        return None
    item = exact.element_size()
    codes, token, *mean = stored
    if token.stride(1) != token.shape[3]:  # laid out for a GPU's kernels
        return None
    sealed = [codes.data_ptr(), *(codes.stride(i) for i in (0, 1, 2))]
    sealed += [token.data_ptr(), *(2 * token.stride(i) for i in (0, 2))]
    sealed += [mean[0].data_ptr(), *(2 * mean[0].stride(i) for i in (0, 1))] if mean else [0, 0, 0]
    strides = (item * exact.stride(i) for i in (0, 1, 2))
    return SealedPlace(
        (exact.data_ptr(), *strides, 0, 0, 0), tuple(sealed), NAMES[exact.dtype], codec, dim, num_heads, block_size
    )
