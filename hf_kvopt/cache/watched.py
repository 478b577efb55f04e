"""WatchedCache: the writes of a paged cache, each of which is let through only where the forwards before it were whole.

    model ─► update / update_conv_state / ... ─► stopped half way? fed again? ─► the layer ─► noted
                                                      └─► taken back, and said

What would give a wrong token without an error: a forward that stopped half way and is gone on from, a state that moved
on in it, a prompt that the cache holds already, and use_cache=False, which feeds the whole text at every step.
"""

import weakref
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache
from transformers.generation import GenerationConfig

from hf_kvopt import compat
from hf_kvopt.cache.fixed import FixedLayer
from hf_kvopt.cache.forwards import KEYS, READ, ForwardLog
from hf_kvopt.cache.layer import PagedLayer
from hf_kvopt.cache.loop import Loop
from hf_kvopt.cache.rows import CacheStep, GrowingRows
from hf_kvopt.cache.whole import columns_left, note_step, refusal, text_columns
from hf_kvopt.errors import CacheStateError
from hf_kvopt.pool.handle import KVHandle
from hf_kvopt.pool.headwise import HeadwiseKV


class WatchedCache(DynamicCache):
    """Base of `PagedCache`, which makes its layers and undoes what is refused here."""

    _rows: GrowingRows
    _guard: CacheStep | None = None
    _makes_layers: bool  # whether the config is not known, so that layers are made as they are written
    _log: ForwardLog | None = None  # where some layers hold more than keys and values of tokens
    _loop: Loop | None = None  # where the model appends layers for further passes
    _states_elsewhere = False  # the model keeps states that this cache never sees
    _first_paged: int | None = None  # the first layer with blocks, once there is one
    _call: weakref.ref[GenerationConfig] | None = None  # the generate() call that was checked last
    records_states = False  # states are copied before each token of a draft, see `recording`
    is_in_token = False  # a layer is being handed its second token of this forward, or a later one, by itself

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new states of one layer; see `PagedLayer.update` for shapes and errors.

        An update that is refused, or breaks off, leaves the cache as it was before the forward that asked for it; with
        convolution or recurrent states, which cannot be taken back, the next one empties the cache and says so.
        """
        layer, num_tokens = self._layer_for(layer_idx), key_states.shape[2]
        is_paged = isinstance(layer, PagedLayer)
        is_watched = not torch.compiler.is_compiling()
        if is_watched:
            if is_paged:
                in_turn = self._in_turn()
                left = columns_left(in_turn, layer, num_tokens)
                if left is not None:
                    self._require_whole(left)
            self._before_write(layer_idx, KEYS if is_paged else "keys of its own", num_tokens, len(key_states))
        try:
            states: tuple[Tensor, Tensor]
            if self.offloading:
                states = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            else:
                states = layer.update(key_states, value_states, *args, **kwargs)
            if is_watched and is_paged:
                note_step(in_turn, layer, num_tokens)
                guard = self._step()
                for handle in states:
                    if isinstance(handle, KVHandle):
                        handle.guard = guard
                    elif isinstance(handle, HeadwiseKV):
                        handle.set_guard(guard)
            return states
        except BaseException:
            # The layer that refused, or broke off, has not advanced: it ends where this forward began. One that holds
            # less than others of its kind did before tells nothing of these.
            if is_paged and not torch.compiler.is_compiling():
                end = int(layer.get_seq_length())
                if end >= layer.table.step_start:
                    self._step().undo_to(end)
            if self._log is not None:
                self._log.note_refusal()
            raise

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Store convolution states; see `update`."""
        self._before_state(layer_idx, f"conv {_state_idx(args, kwargs)}", conv_states.shape[-1])
        states: Tensor = super().update_conv_state(conv_states, layer_idx, *args, **kwargs)
        return states

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Store recurrent states; see `update`."""
        self._before_state(layer_idx, f"recurrent {_state_idx(args, kwargs)}", 1)
        states: Tensor = super().update_recurrent_state(recurrent_states, layer_idx, *args, **kwargs)
        return states

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor:
        """Store the keys of an indexer; see `update`."""
        self._before_state(layer_idx, "indexer", indexer_key_states.shape[-2])
        states: Tensor = super().update_indexer(indexer_key_states, layer_idx, *args, **kwargs)
        return states

    def get_conv_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """Hand out convolution states, which a decode step changes in place; see `update` for errors."""
        self._before_change(layer_idx, f"{READ} conv {_state_idx(args, kwargs)}")
        states: Tensor | None = super().get_conv_state(layer_idx, *args, **kwargs)
        return states

    def get_recurrent_state(self, layer_idx: int, *args: Any, **kwargs: Any) -> Tensor | None:
        """Hand out recurrent states; see `get_conv_state`."""
        self._before_change(layer_idx, f"{READ} recurrent {_state_idx(args, kwargs)}")
        states: Tensor | None = super().get_recurrent_state(layer_idx, *args, **kwargs)
        return states

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        """Return whether a layer has states; before transformers 5.20 a layer asks before it changes them in place."""
        if layer_idx is not None and not compat.HANDS_OUT_STATES:
            self._before_change(layer_idx, f"{READ} {state_idx}", is_once=state_idx is None)
        return bool(super().has_previous_state(layer_idx, state_idx))

    def note_token(self, layer_idx: int, state_idx: int | None) -> None:
        """Copy a state of a layer, or all of them, before a token of a draft changes it; see `StateLayer.note`."""
        layer: Any = self.layers[layer_idx]
        getattr(layer, "states", layer).note(state_idx)

    @property
    def num_columns(self) -> int:
        """Columns of the text that are held; not those of an image that some layers read instead."""
        return text_columns(self.layers)

    @property
    def has_columns(self) -> bool:
        """Return whether any layer holds keys and values of tokens, and not states alone."""
        return self.layer_class_to_replicate is not None or any(isinstance(layer, PagedLayer) for layer in self.layers)

    def _layer_for(self, layer_idx: int) -> Any:
        """The layer of that number, made where the config is not known."""
        while self._makes_layers and len(self.layers) <= layer_idx:
            self.layers.append(self._make_layer())
        layer: Any = self.layers[layer_idx]
        is_foreign = isinstance(layer, PagedLayer) and not self._rows.owns(layer)
        if is_foreign and not torch.compiler.is_compiling():
            raise CacheStateError(
                f"layer {layer_idx} belongs to another cache: got rows unknown to this one; use copy.deepcopy(cache)"
            )
        return layer

    def _step(self) -> CacheStep:
        """The guard of the step that the cache is in."""
        if self._guard is None or self._guard.layers is not self.layers:
            self._guard = CacheStep(self._rows, self.layers)
        return self._guard

    def _make_layer(self) -> PagedLayer:
        """The next layer of a cache that does not know the config."""
        raise NotImplementedError

    def _take_back(self, clock: int) -> None:
        """Undo a forward of which only some layers were written, back to column `clock`."""
        raise NotImplementedError

    def _before_write(self, layer_idx: int, part: str, num_tokens: int, batch: int = 0) -> None:
        """Refuse a write that would give a wrong token."""
        if self.is_in_token:
            return
        log, place = self._log, self._place(layer_idx)
        if log is not None and log.follows_half(place, part):
            self._require_whole(0)
        begins = layer_idx == self._first() if log is None else log.has_only_read or log.begins(place, part)
        # Not at each decode step of a call, which this would make longer.
        if begins and (num_tokens > 1 or self._call is None or self._call() is None):
            try:
                self._check_call(num_tokens, batch)
            except BaseException:
                if log is not None and log.has_only_read:
                    log.take_back()
                raise
        if log is not None:
            log.note(place, part)

    def _before_state(self, layer_idx: int, part: str, num_tokens: int) -> None:
        """Refuse a write of states that would give a wrong token; a graph is not asked."""
        if not torch.compiler.is_compiling():
            self._before_write(layer_idx, part, num_tokens)

    def _before_change(self, layer_idx: int, part: str, is_once: bool = True) -> None:
        """Refuse where states are handed out to a forward, to be changed, and the one before stopped half way.

        Args:
            is_once: whether a forward asks once for this part.
        """
        log, place = self._log, self._place(layer_idx)
        if log is None or self.is_in_token or torch.compiler.is_compiling():
            return
        if not is_once and (place, part) in log.written:
            return
        if log.follows_half(place, part):
            self._require_whole(0)
        log.note(place, part)

    def _place(self, layer_idx: int) -> int:
        """Return how many layers a forward writes before this one."""
        return layer_idx if self._loop is None else self._loop.place(layer_idx)

    def _first(self) -> int | None:
        """The number of the first layer with blocks."""
        if self._first_paged is None:
            self._first_paged = next((i for i, one in enumerate(self.layers) if isinstance(one, PagedLayer)), None)
        return self._first_paged

    def _in_turn(self) -> list[Any]:
        """The layers, in the order in which a forward writes them."""
        return self.layers if self._loop is None else self._loop.in_turn(self.layers)

    def _check_call(self, num_tokens: int, batch: int) -> None:
        """Refuse what the running generate() call would feed on top of itself."""
        call = compat.running_call(self)
        if call is None:
            return
        if call.config.use_cache is False:
            raise CacheStateError(
                "use_cache=False with a cache passed in feeds the whole text again at every step: got both; drop "
                f"use_cache=False or {compat.CACHE_KEYWORD}"
            )
        is_new = self._call is None or self._call() is not call.config
        self._call = weakref.ref(call.config)
        held = 0  # states alone do not say how many tokens they sum up
        if self.has_columns or not all(self.is_linear):
            held = self.num_columns if self.has_columns else int(self.get_seq_length())
        if is_new and batch and call.longest:
            for layer in self.layers:
                if isinstance(layer, FixedLayer):
                    layer.require_capacity(batch, call.longest)
                    break
        if not is_new or not held:
            return
        if self._states_elsewhere:
            raise CacheStateError(
                "this model keeps its recurrent states in its modules, where the last forward of any call left them: "
                f"got a cache that holds {held} tokens of a call before; pass an empty cache, or none, and the whole "
                "text"
            )
        # Of a prompt that is held whole, transformers drops some of the first tokens, or none.
        if num_tokens == 2 * call.columns - held:
            require_shorter(held, call.columns)
        # Its assisted decoding drops none in the first forward, nor did prefills in chunks.
        is_chunked = bool(call.config.prefill_chunk_size) and not compat.PREFILL_CHUNKS_GO_ON
        if call.num_ids == call.columns and (num_tokens >= call.columns or is_chunked):
            raise CacheStateError(
                f"tokens were fed again that are among the {held} cached ones: got assisted decoding, or a prefill in "
                f"chunks before transformers 5.21, over a cache that is not empty; pass the {call.columns - held} new "
                "tokens alone, with an attention_mask over all, or an empty cache"
            )

    def _require_whole(self, left: int | None) -> None:
        """Raise where the forward before this one never reached its last layers (an interrupt, an error in a model)."""
        if left is None:
            return
        if self._log is not None:
            left = 0
            self.reset()
        self._take_back(left)
        raise refusal(left)


def require_shorter(held: int, columns: int) -> None:
    """Raise CacheStateError where a cache holds all `columns` of a prompt, as transformers would feed a part again."""
    if 0 < columns <= held:
        raise CacheStateError(
            f"the prompt has {columns} tokens: got a cache that holds {held}, and is not shorter than the prompt, "
            "which transformers then feeds again; call cache.reset(), or cache.crop(-n) so that at least the last "
            "prompt token is missing"
        )


def _state_idx(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Which of the states of a layer is meant."""
    return args[0] if args else kwargs.get("state_idx", 0)
