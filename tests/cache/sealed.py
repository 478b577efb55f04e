"""What the tests of sealed blocks share: layers fed with states, and attention over them beside the reference."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hf_kvopt import PagedCache, QuantizedPagedCache
from hf_kvopt.attention.forward import attention_forward
from hf_kvopt.attention.mask import LazyMask, Pattern
from hf_kvopt.kernels.pattern import Pattern as Scoring
from hf_kvopt.kernels.reference.sealed import sealed_reference
from hf_kvopt.quant import KV_FORMATS, get_kv_format

BLOCK, HEADS, DIM = 16, 2, 32
FORMATS = [name for name, format in KV_FORMATS.items() if format.sealed is not None]
MODULE = nn.Module().eval()


class Text(NamedTuple):
    """Queries, keys and values of a batch of rows at one layer."""

    q: Tensor  # [batch, 2 * HEADS, tokens, DIM]
    k: Tensor  # [batch, HEADS, tokens, DIM]
    v: Tensor

    def columns(self, start: int, stop: int) -> "Text":
        """Some columns."""
        return Text(*(x[:, :, start:stop] for x in self))

    def rows(self, indices: Sequence[int]) -> "Text":
        """Some rows."""
        return Text(*(x[list(indices)] for x in self))


def text(
    batch: int, num_tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32, dims: tuple[int, int] = (DIM, DIM)
) -> Text:
    """Random states; keys have loud channels, as biases make them, and the first of a row lies opposite to the rest."""
    made = torch.Generator().manual_seed(seed)
    sizes = (2 * HEADS, dims[0]), (HEADS, dims[0]), (HEADS, dims[1])
    q, k, v = (torch.randn(batch, heads, num_tokens, dim, generator=made) for heads, dim in sizes)
    k[..., 5] += 20.0
    k[:, :, 0] = -k[:, :, 0]
    return Text(*(x.to(dtype) for x in (q, k, v)))


def make_cache(name: str, block_size: int = BLOCK, **options: Any) -> QuantizedPagedCache:
    """A cache that makes its layers as they are written."""
    return QuantizedPagedCache(format=name, block_size=block_size, **options)


def feed(cache: PagedCache, part: Text, mask: Tensor | None = None, **options: Any) -> Tensor:
    """Write the columns of `part` behind what layer 0 holds, and attend: [batch, tokens, 2 * HEADS, DIM]."""
    with torch.no_grad():
        k, v = cache.update(part.k, part.v, 0)
        return attention_forward(MODULE, part.q, k, v, mask, **options)[0]


def feed_in(cache: PagedCache, whole: Text, chunk: int, start: int = 0) -> Tensor:
    """`feed` all of a text in chunks."""
    num_tokens = whole.q.shape[2]
    return torch.cat(
        [feed(cache, whole.columns(i, min(i + chunk, num_tokens))) for i in range(start, num_tokens, chunk)], 1
    )


def expected(name: str, whole: Text, start: int = 0, block_size: int = BLOCK, **pattern: Any) -> Tensor:
    """What queries from `start` on get by the reference."""
    sealed = get_kv_format(name).sealed
    assert sealed is not None
    lags = pattern.pop("lags", None)
    scoring = Scoring(whole.q.shape[3] ** -0.5, **pattern)
    out = sealed_reference(whole.q[:, :, start:], whole.k, whole.v, sealed, block_size, scoring, lags).out
    return out.to(whole.q.dtype)


def left_padding(pads: Sequence[int], q_len: int, kv_len: int, window: int | None = None) -> LazyMask:
    """The mask of rows with so many pads on the left, as the model's mask function makes it."""
    padding = torch.arange(kv_len) >= torch.tensor(pads)[:, None]
    shape = (len(pads), 1, q_len, kv_len)
    return LazyMask(shape, torch.device("cpu"), Pattern(True, window), padding, lambda: None)


def stored(cache: PagedCache, row: int) -> list[Tensor]:
    """Codes and parameters of a row's full blocks but the first, at layer 0, as bytes."""
    layer = cache.layers[0]
    table = layer.table
    full = table.lengths[row] // table.block_size
    blocks = table.rows[row][1:full]
    return [part[blocks].contiguous().view(torch.uint8) for plane in layer.pool.planes for part in plane.stored]
