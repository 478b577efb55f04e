"""PrefixSharedCache: a paged cache over the blocks of a store, filled with what the store knows of a prompt.

    columns    0 ........ 4095 | 4096 ... n-1 | n ...            known blocks are shared, by reference
    row 0      [ known blocks ][ generate() computes the rest, then decodes ]
    row 1      ----[ known    ][              ]                  left padding is not stored: rows begin later

The length that `generate` is told is one for the batch, always below the prompt's, and the first forward must bring
just the columns that are missing: whatever would drop a token of the prompt, or feed it twice, is refused.
"""

import copy
from collections.abc import Hashable, Iterable, Sequence
from typing import Any, Self

from torch import Tensor

from hf_kvopt import compat
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.cache.rows import GrowingRows
from hf_kvopt.cache.states import RowStates, put_rows
from hf_kvopt.pool import tail
from hf_kvopt.prefix.filled import FilledCache
from hf_kvopt.prefix.shared_blocks import SharedBlocks
from hf_kvopt.prefix.texts import until

Row = list[int]  # of blocks


class PrefixSharedCache(FilledCache):
    """Cache that `PrefixStore.cache` returns; hand it to `generate` once, then to `PrefixStore.commit`.

    Between calls: every row holds references on its blocks, and gives them back when the cache is committed or
    dropped. Its own last block is copied before it is written where anybody shares it.
    """

    def __init__(self, blocks: SharedBlocks) -> None:
        self.blocks = blocks
        self.is_reordered = False
        super().__init__(
            blocks.config, block_size=blocks.block_size, max_tokens=blocks.max_tokens, formats=blocks.formats
        )
        # An early exit (`assistant_early_exit`) leaves layers of the config out.
        self.is_whole = len(self.layers) == blocks.num_layers
        for idx, layer in enumerate(self.layers):
            # Caches before this one know which layers a forward writes.
            if isinstance(layer, PagedLayer) and idx in blocks.pools:
                layer.pool, layer.in_step = blocks.pools[idx], True

    @property
    def num_shared(self) -> int:
        """Columns that were filled before `generate` began."""
        return self._filled

    @property
    def is_blank(self) -> bool:
        """Return whether it belongs to no prompt yet and holds nothing."""
        return self.texts is None and not self.get_seq_length()

    @property
    def is_only_filled(self) -> bool:
        """Return whether it holds a part of its prompt, and no forward has written to it."""
        return self._filled > 0 and not self._is_used

    def begin(self, key: Hashable, namespace: Hashable, texts: list[list[int]], pads: list[int]) -> None:
        """Make this cache one for the prompts `texts`, of which nothing is held yet."""
        self.key, self.namespace, self.texts, self.pads = key, namespace, texts, pads
        self.prompt_columns = pads[0] + len(texts[0])

    def pin(self, blocks: Sequence[Iterable[int]]) -> None:
        """Keep blocks of each row as they are computed, where others are sealed: texts will go on from there."""
        for table in self._tables.values():
            tail.pin(table, blocks)

    @property
    def exact_blocks(self) -> list[set[int]]:
        """The blocks of each row that all tables which seal have as they were computed."""
        tables = [table for table in self._tables.values() if table.allocator.tails is not None]
        rows = [[set(blocks) for blocks in table.exact] for table in tables if table.exact]
        return [set.intersection(*some) for some in zip(*rows, strict=True)] if rows else []

    def fill(
        self,
        rows: Sequence[Sequence[Row]],
        lags: Sequence[int],
        columns: int,
        states: Sequence[RowStates | None] = (),
    ) -> None:
        """Take over `rows` (for each table, one row of retained blocks a text), which reach up to `columns`.

        Args:
            states: what the layers with states hold there, for each row; None is a row without a token.
        """
        if not columns and not any(lags):
            return  # rows that begin with the first forward are laid out by it
        self.append_passes()
        for table, held in zip(self._tables.values(), rows, strict=True):
            table.adopt(held, lags, columns)
        for idx, layer in enumerate(self.layers):
            if isinstance(layer, PagedLayer):
                layer.clock, layer.pool = columns, self.blocks.pools.get(idx)
        put_rows(self._stock_layers(), states if columns else ())
        self._filled = self._seen = columns

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `PagedCache.update`.

        Raises:
            CacheStateError: also where the cache was committed, is fed other columns than it lacks, or was made before
                the model changed.
        """
        layer = self.layers[layer_idx]
        assert isinstance(layer, PagedLayer)  # the store takes no model with other layers that hold anything
        # The store's pools may be replaced by larger ones: never between planning a write and making it.
        with self.blocks.lock:
            self._require_open()
            self._seen = min(self._seen, self._rows.clock)  # of a step that was undone nothing was seen
            if self.texts is not None and layer.clock == self._seen:
                with self._noted(layer_idx):
                    self._begin_forward(len(key_states), key_states.shape[2])
            if layer.is_empty:
                self._choose_pool(layer, layer_idx, key_states, value_states)
            try:
                states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            finally:
                # Also where it broke off behind the write: the tokens are kept, so others must find them.
                if layer.pool is not None:
                    self.blocks.pools.setdefault(layer_idx, layer.pool)
            self._is_used = True
        self._seen = max(self._seen, layer.clock)
        return states

    def crop(self, tokens_to_remove: int) -> None:
        with self.blocks.lock:
            self._require_open()
            super().crop(tokens_to_remove)
            self._seen = self.get_seq_length()

    def crop_rows(self, lengths: Sequence[int]) -> None:
        with self.blocks.lock:
            self._require_open()
            super().crop_rows(lengths)
            self._seen = self.get_seq_length()

    def keep_paths(self, num_tokens: int, paths: Sequence[Sequence[int]]) -> None:
        with self.blocks.lock:
            self._require_open()
            super().keep_paths(num_tokens, paths)
            self._seen = self.get_seq_length()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        # What beams hold is no longer in the order of the texts that generate() returns.
        self.is_reordered = True
        super().reorder_cache(beam_idx)

    def reset(self) -> None:
        """Forget all tokens and the prompt; the store keeps what it knows."""
        with self.blocks.lock:
            super().reset()
        self._forget_prompt()
        self.is_reordered = False

    def free(self) -> None:
        """Forget all tokens, as `reset` does: the memory is the store's."""
        self.reset()

    @property
    def is_current(self) -> bool:
        """Return whether what this cache wrote lies where the store's other caches would look for it."""
        return all(layer.pool is self.blocks.pools.get(idx) for idx, layer in self._written())

    def rows_held(self, *, is_prompt_whole: bool) -> tuple[list[list[Row]], list[int]]:
        """Return for each table the rows of blocks, and how many tokens of each row all layers have written.

        Args:
            is_prompt_whole: the forward over the prompt is known to have ended, so that the model never writes those
                layers that were not written.
        """
        tables = list(self._tables.values())
        # A forward that broke off may never have come to the layers of some table. What was computed behind a cut into
        # sealed blocks is not what the text alone gives.
        if not tables or not all(table.rows for table in tables) or any(table.is_approximate for table in tables):
            return [[] for _ in tables], []
        clocks = [layer.clock for _, layer in self._written()]
        if not is_prompt_whole:
            clocks.append(self._paged_layers()[-1].clock)
        columns = min(clocks, default=0)
        lengths = [max(0, columns - lag) for lag in tables[0].lags]
        return [table.rows for table in tables], lengths

    def extended(self, output_ids: Tensor, ends: set[int]) -> list[list[int]] | None:
        """The prompts with what was generated behind them, up to a token of `ends`; None where the ids do not fit."""
        texts, columns = self.texts or [], self.prompt_columns
        rows = output_ids.tolist()
        held = self.get_seq_length()
        fits = len(rows) == len(texts) and output_ids.shape[1] in (held, held + 1)
        if not fits or any(row[pad:columns] != text for row, pad, text in zip(rows, self.pads, texts, strict=True)):
            return None
        return [text + until(row[columns:], ends) for text, row in zip(texts, rows, strict=True)]

    def close(self) -> None:
        """Give all blocks back and refuse any further use."""
        with self.blocks.lock:
            super().reset()
        self.is_committed = True

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("a PrefixSharedCache lives in its store: got a request to pickle one; use store.save(path)")

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        with self.blocks.lock:
            return super().__deepcopy__(memo)

    def _written(self) -> list[tuple[int, PagedLayer]]:
        """The layers that were ever written, with their numbers."""
        numbered = [(idx, layer) for idx, layer in enumerate(self.layers) if isinstance(layer, PagedLayer)]
        return [(idx, layer) for idx, layer in numbered if layer.pool is not None]

    def _choose_pool(self, layer: PagedLayer, layer_idx: int, key_states: Tensor, value_states: Tensor) -> None:
        """Let a layer that holds nothing write where the store's other caches do.

        Where the model computes in another dtype or on another device than it did, all texts are forgotten: no later
        cache can go on with them.
        """
        pool = self.blocks.pools.get(layer_idx)
        if pool is not None and not pool.matches(key_states, value_states):
            layer.is_first = pool.reads.is_first
            self.blocks.forget_pool(layer_idx)
            pool = None
        layer.pool = pool

    def _make_rows(self) -> GrowingRows:
        return GrowingRows(self.blocks.table_for, self.blocks.lock)

    def _select(self, indices: Sequence[int]) -> None:
        with self.blocks.lock:
            super()._select(indices)
        if self.texts is not None:
            self.texts, self.pads = [self.texts[i] for i in indices], [self.pads[i] for i in indices]

    def append_passes(self) -> None:
        """Append the layers that the model would: it cannot copy what is filled with a known text."""
        if self.is_whole:
            sources = compat.appended_layers(self.blocks.config.get_text_config(decoder=True))
            missing = sources[len(self.layers) - self.blocks.num_layers :]
            self.layers += [copy.deepcopy(self.layers[idx]) for idx in missing]
