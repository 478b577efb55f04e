"""GraphStep: one token of each decoding row as a step whose tensors keep their shapes and addresses.

    block table   [7][2][9][0]     int32, rows and columns rounded up to a few sizes: a bucket
                  [5][0][0][0]
                  [0][0][0][0]     no row: it holds nothing, and what it writes goes nowhere
    lengths       [41] [9] [0]     tokens held, with the new one
    slots         [152] [88] [-1]  where the new one goes

Blocks are reserved before, on the host, as for any step. The step itself asks the host for nothing and makes no mask,
so that `torch.compile(fullgraph=True)` takes it whole, and a CUDA graph can replay it; numbers reach the device in one
copy. Prompts, and rows that draft, are read eagerly beside it.
"""

import functools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import CompileConfig

from hf_kvopt import compat
from hf_kvopt.batching.packed import EmptyLooking
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.pool.block_table import BlockTable
from hf_kvopt.pool.handle import KVHandle, KVSpec, KVView, Stored, TableRows
from hf_kvopt.pool.plane import Plane
from hf_kvopt.pool.storage import KVPool
from hf_kvopt.prefix.batch import BatchCache
from hf_kvopt.quant import CENTRE_TOKENS

_GROWTH = 4  # from bucket to bucket, in rows and in blocks
_LEAST_BLOCKS = 16
_MOST_GRAPHS = 8  # torch compiles one function for no more shapes (its recompile_limit)
logger = logging.getLogger(__name__)


class Places(NamedTuple):
    """Holds where the rows of one table lie; all at addresses that stay."""

    block_table: Tensor  # [rows, blocks] int32
    seq_lens: Tensor  # [rows] int32
    slots: Tensor  # [rows] int64, -1 where there is no row
    mask: Tensor  # [rows, 1, 1, blocks * block_size] bool: what each row holds and sees


class StepCache(EmptyLooking):
    """Stands for the cache that the model takes: writes each layer's token to its slot, and hands out the rows.

    Args:
        layers: of the rows' cache.
        places: of each layer.
    """

    def __init__(self, layers: Sequence[PagedLayer], places: Sequence[Places]) -> None:
        super().__init__(layers)
        self.pools = [layer.pool for layer in layers]
        self.places = list(places)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store states [rows, num_kv_heads, 1, head_dim], and hand back all that the rows hold."""
        pool, places = self.pools[layer_idx], self.places[layer_idx]
        assert isinstance(pool, KVPool)
        pool.store(key_states, value_states, None, lambda: places.slots)
        return _handle(pool.keys, places), _handle(pool.values, places)


class Bucket:
    """The tensors of steps over up to `num_rows` rows of up to `num_blocks` blocks.

    Args:
        cache: the rows' cache, for its layers and tables.
        num_rows: rows.
        num_blocks: blocks of a row.
        device: where the model computes.
    """

    def __init__(self, cache: BatchCache, num_rows: int, num_blocks: int, device: torch.device) -> None:
        self.num_rows, self.num_blocks = num_rows, num_blocks
        self.size = cache.blocks.block_size
        with torch.inference_mode(False):
            self.input_ids, self.position_ids = torch.zeros(2, num_rows, 1, dtype=torch.int64, device=device)
            self.columns = torch.arange(num_blocks * self.size, device=device)
            self.places = [self._new_places(device) for _ in cache.tables]
        for tensor in (self.input_ids, self.position_ids, *(x for places in self.places for x in places)):
            torch._dynamo.mark_static_address(tensor)
        number = {id(table): i for i, table in enumerate(cache.tables)}
        layers: list[Any] = cache.layers
        self.pools = [layer.pool for layer in layers]
        self.cache = StepCache(layers, [self.places[number[id(layer.table)]] for layer in layers])

    def is_of(self, cache: BatchCache) -> bool:
        """Tell whether the layers of a cache lie in the pools that these tensors are for."""
        layers: list[Any] = cache.layers
        return all(pool is layer.pool for pool, layer in zip(self.pools, layers, strict=True))

    def fill(self, tables: Sequence[BlockTable], tokens: Sequence[int], positions: Sequence[int]) -> None:
        """Take over the rows of `tables`, whose last column is to be written; one copy to the device."""
        rows = [[token, position] for token, position in zip(tokens, positions, strict=True)]
        for table in tables:
            for row, blocks, length in zip(rows, table.rows, table.lengths, strict=True):
                last = length - 1
                slot = blocks[last // self.size] * self.size + last % self.size
                row += [length, slot, *blocks, *[0] * (self.num_blocks - len(blocks))]
        nothing = [0, 0, *[0, -1, *[0] * self.num_blocks] * len(tables)]
        rows += [nothing] * (self.num_rows - len(rows))
        given = torch.tensor(rows, device="cpu").to(self.input_ids.device, non_blocking=True)
        self.input_ids.copy_(given[:, :1])
        self.position_ids.copy_(given[:, 1:2])
        for i, (table, places) in enumerate(zip(tables, self.places, strict=True)):
            first = 2 + i * (2 + self.num_blocks)
            lens = given[:, first]
            places.seq_lens.copy_(lens)
            places.slots.copy_(given[:, first + 1])
            places.block_table.copy_(given[:, first + 2 : first + 2 + self.num_blocks])
            seen = self.columns < lens[:, None]
            if table.window is not None:
                seen &= self.columns >= lens[:, None] - table.window
            places.mask.copy_(seen[:, None, None])

    def _new_places(self, device: torch.device) -> Places:
        return Places(
            torch.zeros(self.num_rows, self.num_blocks, dtype=torch.int32, device=device),
            torch.zeros(self.num_rows, dtype=torch.int32, device=device),
            torch.full((self.num_rows,), -1, dtype=torch.int64, device=device),
            torch.zeros(self.num_rows, 1, 1, self.num_blocks * self.size, dtype=torch.bool, device=device),
        )


class GraphStep:
    """Decodes one token of each row of a batch in a compiled step.

    Args:
        model: what reads.
        config: how the step is compiled; `fullgraph` is always on.
    """

    def __init__(self, model: PreTrainedModel, config: CompileConfig) -> None:
        self.model = model
        options = {**config.to_dict(), "fullgraph": True, "dynamic": False}
        options = {name: value for name, value in options.items() if not name.startswith("_")}
        self._forward = torch.compile(model.forward, **options)
        self._keyword = compat.cache_keyword(model)
        decoder = model.config.get_text_config(decoder=True)
        # Chunks are no window, and latent attention puts keys together from parts.
        is_chunked = "chunked_attention" in compat.layer_types(decoder)[0]
        self._is_eager = is_chunked or vars(decoder).get("kv_lora_rank") is not None
        self.buckets: dict[tuple[int, ...], Bucket] = {}

    def bucket_for(self, cache: BatchCache) -> Bucket | None:
        """Return the tensors for the rows of a cache, with one more token each; None where they are read eagerly.

        So are rows that seal their blocks, and those whose keys are stored less a centre, or are too few to learn one.
        """
        if self._is_eager or not all(_is_plain(layer) for layer in cache.layers):
            return None
        longest = max(length // cache.blocks.block_size + 1 for table in cache.tables for length in table.lengths)
        num_rows, num_blocks = _rounded(cache.num_rows, 1), _rounded(longest, _LEAST_BLOCKS)
        sizes = []
        for table in cache.tables:
            if table.allocator.max_blocks is not None:
                table.allocator.extend(table.allocator.max_blocks)  # at once: pools that grow lie elsewhere
            sizes.append(table.allocator.num_blocks)
        bucket = self.buckets.get((num_rows, num_blocks, *sizes))
        if bucket is None and len(self.buckets) < _MOST_GRAPHS:
            logger.info("a decoding step of up to %d rows of %d blocks is compiled", num_rows, num_blocks)
            bucket = Bucket(cache, num_rows, num_blocks, self.model.device)
            self.buckets[num_rows, num_blocks, *sizes] = bucket
        elif bucket is None:
            _say_once()
        return bucket if bucket is not None and bucket.is_of(cache) else None

    def read(self, bucket: Bucket, cache: BatchCache, tokens: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Read one token of each row; returns logits [rows, vocab] float32.

        Raises:
            OutOfBlocks: see `BlockTable.reserve`.
        """
        cache.claim(1)
        bucket.fill(cache.tables, tokens, positions)
        outputs = self._forward(
            input_ids=bucket.input_ids,
            position_ids=bucket.position_ids,
            use_cache=True,
            return_dict=True,
            **{self._keyword: bucket.cache},
        )
        logits: Tensor = outputs.logits[: len(tokens), -1].float()
        return logits


def _handle(plane: Plane, places: Places) -> KVHandle:
    rows, columns = places.mask.shape[0], places.mask.shape[3]
    shape = (rows, plane.num_heads, columns, plane.dim)
    spec = KVSpec(shape, plane.dtype, plane.format.name, plane.rotates, is_scattered=True)
    stored = Stored(plane.codes, plane.scale, plane.rotates) if torch.compiler.is_compiling() else plane.stored
    return KVHandle(KVView(stored, TableRows(places.block_table, places.seq_lens), spec), mask=places.mask)


def _is_plain(layer: Any) -> bool:
    """Tell whether a layer stores each token of its rows by itself."""
    if not isinstance(layer, PagedLayer) or not isinstance(layer.pool, KVPool) or not layer.in_step:
        return False
    keys = layer.pool.keys
    is_young = keys.centres is not None and min(layer.table.lengths, default=0) < CENTRE_TOKENS
    return not is_young and keys.centre_of(layer.table) is None


@functools.cache
def _say_once() -> None:
    logger.warning("%d decoding steps were compiled: rows of further sizes are read eagerly", _MOST_GRAPHS)


def _rounded(number: int, least: int) -> int:
    while least < number:
        least *= _GROWTH
    return least
